"""The training room: what a step, an epoch and a run do, and that evaluation leaves no trace."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fake_cupy
import numpy as np
import pytest

from inception.data import Augment, DataError, Dataset, Loader, load_shapes, mean_and_std
from inception.evaluate import predictions
from inception.models import InceptionBlock, create_model
from inception.training import Epoch, Evaluation, Recipe, Run, Training, evaluate, run, to_tensor, train
from inception.training.step import training_step
from inception.weights import load_weights
from minigrad import Tensor, nn, num_threads, ops, optim, schedule, set_backend, set_num_threads
from minigrad.backend import asarray, to_host
from minigrad.errors import MinigradError, NonFiniteError, ShapeError
from minigrad.random import Key, integers, normal, seeded

loop_module = importlib.import_module("inception.training.loop")
step_module = importlib.import_module("inception.training.step")
run_module = importlib.import_module("inception.training.run")  # the package's `run` is the function in it


def small_shapes(train: int, test: int = 24) -> tuple[Dataset, Dataset]:
    """Every second pixel of the shapes: 16×16, for a quarter of the work."""
    sets = load_shapes(train, test)
    first, second = (dataclasses.replace(s, images=np.ascontiguousarray(s.images[:, ::2, ::2])) for s in sets)
    return first, second


def loader(dataset: Dataset, batch_size: int = 16, **options: Any) -> Loader:
    mean, std = mean_and_std(dataset)
    return Loader(dataset, batch_size, mean=mean, std=std, **options)


class Net(nn.Module):
    """The cheapest model with all that matters here: a convolution, batch norm, dropout, a classifier."""

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        with seeded(3):
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(6, relu=True)
            self.dropout = nn.Dropout(dropout)
            self.fc = nn.Linear(6, classes)
        self.outputs: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.fc(self.dropout(ops.global_avg_pool2d(x).flatten()))
        self.outputs.append(x)
        self.modes.append(self.training)
        return x


class ThreeLogits(NamedTuple):
    aux1: Tensor
    aux2: Tensor
    logits: Tensor


class Fixed(nn.Module):
    """A model whose outputs are its parameters, so that their gradients are the losses' own."""

    def __init__(self, n: int, classes: int) -> None:
        self.first, self.second, self.last = (
            nn.Parameter(asarray(normal(Key(7).fold(i), (n, classes)).astype("float32"))) for i in range(3)
        )

    def forward(self, x: Tensor) -> ThreeLogits:
        return ThreeLogits(self.first, self.second, self.last)


@pytest.fixture
def threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: to_host(p.data).copy() for name, p in model.named_parameters()}


# ---- A step ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_minimises_the_classifiers_loss_plus_a_share_of_each_heads(xp: Any, smoothing: float) -> None:
    """The gradient of cross-entropy with respect to logits is (softmax − target) / N, times the loss's weight."""
    n, k = 6, 5
    model, labels = Fixed(n, k), integers(Key(8), k, n)
    batch = step_module.Batch(np.zeros((n, 3, 4, 4), np.float32), labels, np.arange(n))
    losses, hits = training_step(model, batch, Recipe(label_smoothing=smoothing))

    target = np.full((n, k), smoothing / k)
    target[np.arange(n), labels] += 1 - smoothing
    wanted = {"loss": (model.last, 1.0), "aux1": (model.first, 0.3), "aux2": (model.second, 0.3)}
    assert list(losses) == list(wanted)
    for name, (logits, weight) in wanted.items():
        logs = log_softmax(to_host(logits.data))
        assert float(losses[name]) == pytest.approx(-(target * logs).sum(axis=1).mean(), rel=1e-5)
        assert logits.grad is not None
        np.testing.assert_allclose(to_host(logits.grad), weight * (np.exp(logs) - target) / n, rtol=1e-4, atol=1e-7)
    assert int(hits) == (to_host(model.last.data).argmax(axis=1) == labels).sum()


def test_the_heads_weight_is_the_recipes() -> None:
    grads = []
    for weight in (0.3, 0.6):
        model = Fixed(4, 3)
        batch = step_module.Batch(np.zeros((4, 3, 4, 4), np.float32), np.array([0, 1, 2, 0]), np.arange(4))
        training_step(model, batch, Recipe(head_weight=weight))
        assert model.first.grad is not None
        assert model.last.grad is not None
        grads.append((model.first.grad, model.last.grad))
    np.testing.assert_allclose(grads[1][0], 2 * grads[0][0], rtol=1e-5)
    np.testing.assert_array_equal(grads[1][1], grads[0][1])


def test_a_step_never_waits_for_the_device(xp: Any) -> None:
    """Forward, backward and update with heads, dropout and batch norm: every weight moves, no number is read back."""
    dataset, _ = small_shapes(8)
    model = create_model("googlenet_small", aux_logits=True)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    before = weights_of(model)
    (batch,) = loader(dataset, 8).batches(0)
    fake_cupy.SYNCS.clear()
    model.set_key(Key(0).fold(0), batch.rows)
    losses, _ = training_step(model, batch, Recipe())
    optimizer.step(lr=0.1, momentum=0.9)
    optimizer.zero_grad()
    assert not fake_cupy.SYNCS
    assert all(type(loss) is type(xp.zeros(())) or np.isscalar(loss) for loss in losses.values())
    after = weights_of(model)
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
    assert all(np.isfinite(value).all() and value.dtype == np.float32 for value in after.values())


class Narrow(nn.Module):
    """What the small GoogLeNet is made of, cheap enough for a stand-in: a unit, an Inception block, a classifier."""

    def __init__(self) -> None:
        with seeded(5):
            self.stem = nn.ConvNormReLU(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, relu=True))
            self.block = InceptionBlock(6, 4, 3, 4, 2, 3, 5)
            self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(ops.global_avg_pool2d(self.block(self.stem(x))).flatten())


def losses_of_steps(build: Callable[[], nn.Module], dtype: str, steps: int) -> list[float]:
    """As trained on the default backend, on augmented pictures, with all that the default recipe does."""
    dataset, _ = small_shapes(64)
    training = Training(build().astype(dtype), loader(dataset, 8, augment=Augment()), Recipe(lr=0.05), quiet=True)
    losses = []
    for epoch in range(-(-steps // len(training.loader))):
        for batch in training.loader.batches(epoch):
            training.model.set_key(Key(0).fold(training.step), batch.rows)
            found, _ = training_step(training.model, batch._replace(images=batch.images.astype(dtype)), training.recipe)
            training._update()
            training.step += 1
            losses.append(float(found["loss"]))
    return losses[:steps]


def small_googlenet() -> nn.Module:
    with seeded(0):
        return create_model("googlenet_small", aux_logits=True, dropout=0.4)


@pytest.mark.parametrize(
    ("xp", "build", "steps"),
    [
        pytest.param("fake_cupy", Narrow, 20, id="fake_cupy"),
        pytest.param("cupy", Narrow, 20, id="cupy", marks=pytest.mark.gpu),
        pytest.param("cupy", small_googlenet, 20, id="cupy, googlenet_small", marks=pytest.mark.gpu),
    ],
    indirect=["xp"],
)
def test_a_gpu_takes_the_steps_that_the_host_takes(xp: Any, build: Callable[[], nn.Module], steps: int) -> None:
    """In float32 the first, before rounding is multiplied by training; in float64 all of them."""
    there = {dtype: losses_of_steps(build, dtype, n) for dtype, n in (("float32", 1), ("float64", steps))}
    set_backend("numpy")  # the fixture sets it back
    here = {dtype: losses_of_steps(build, dtype, len(losses)) for dtype, losses in there.items()}
    assert there["float32"] == pytest.approx(here["float32"], rel=1e-5)
    assert there["float64"] == pytest.approx(here["float64"], rel=1e-6)
    assert here["float64"][-1] != pytest.approx(here["float64"][0], rel=1e-2)  # it does train


def test_how_often_training_waits_does_not_depend_on_the_number_of_steps(
    monkeypatch: pytest.MonkeyPatch, xp: Any
) -> None:
    waits = []
    for n in (16, 48):
        dataset, _ = small_shapes(n)
        fake_cupy.SYNCS.clear()
        recipe = Recipe(epochs=1, ema=0.9, clip_norm=1.0, label_smoothing=0.1, warm_up=0.5)
        reports = train(Net(dropout=0.5), loader(dataset, 8), recipe, quiet=True)
        waits.append(sum(fake_cupy.SYNCS.values()))
        assert math.isfinite(reports[0].losses["loss"])
        assert 0 <= reports[0].accuracy <= 1
    assert waits[0] == waits[1]


@pytest.mark.parametrize("memory", ["channels-last", "channels-first"])
def test_to_tensor_is_channels_last_on_every_backend(xp: Any, memory: str) -> None:
    pictures = normal(Key(1), (2, 5, 4, 3)).astype(np.float32).transpose(0, 3, 1, 2)  # (2, 3, 5, 4)
    if memory == "channels-first":
        pictures = np.ascontiguousarray(pictures)
    before = pictures.copy()
    tensor = to_tensor(pictures)
    assert isinstance(tensor.data, xp.ndarray)
    assert tensor.shape == (2, 3, 5, 4)
    assert tensor.dtype == np.float32
    assert not tensor.requires_grad
    assert tensor.data.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_array_equal(to_host(tensor.data), pictures)
    np.testing.assert_array_equal(pictures, before)


# ---- Epochs ----


@pytest.mark.parametrize("heads", [False, True])
def test_an_epochs_report(heads: bool) -> None:
    dataset, test = small_shapes(64)
    model = create_model("googlenet_small", aux_logits=heads)
    seen: list[Epoch] = []
    reports = train(
        model, loader(dataset, drop_last=True), Recipe(epochs=2), test=loader(test), quiet=True, after_epoch=seen.append
    )
    assert seen == reports
    assert [report.number for report in reports] == [1, 2]
    for report in reports:
        assert list(report.losses) == ["loss", "aux1", "aux2"][: 3 if heads else 1]
        assert all(type(value) is float and math.isfinite(value) for value in report.losses.values())
        assert report.seconds > 0
        assert report.pictures_per_second == pytest.approx(64 / report.seconds)
        assert report.accuracy * 64 == round(report.accuracy * 64)
    total = 2 * 4
    lr = schedule.one_cycle(total, 0.3)
    assert [report.lr for report in reports] == [0.1 * lr(3), 0.1 * lr(7)]
    assert reports[-1].test == evaluate(model, loader(test), quiet=True)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_without_test_pictures_there_is_no_evaluation() -> None:
    dataset, _ = small_shapes(8)
    model = Net()
    (report,) = train(model, loader(dataset, 8), Recipe(epochs=1), quiet=True)
    assert report.test is None
    assert model.modes == [True]


def test_losses_are_means_over_the_steps_and_accuracy_over_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = small_shapes(20)
    steps = []

    def record(*args: Any) -> Any:
        losses, hits = training_step(*args)
        steps.append((float(losses["loss"]), int(hits)))
        return losses, hits

    monkeypatch.setattr(step_module, "training_step", record)
    (report,) = train(Net(), loader(dataset, 8), Recipe(epochs=1), quiet=True)
    assert len(steps) == 3  # the last of four pictures
    assert report.losses["loss"] == pytest.approx(np.mean([loss for loss, _ in steps]), rel=1e-6)
    assert report.accuracy == sum(hits for _, hits in steps) / 20


@pytest.mark.parametrize("heads", [False, True])
def test_one_batch_can_be_learnt_by_heart(heads: bool) -> None:
    dataset, _ = small_shapes(16)
    model = create_model("googlenet_small", aux_logits=heads)
    reports = train(model, loader(dataset), Recipe(epochs=14, weight_decay=0.0), quiet=True)
    assert all(math.isfinite(value) for report in reports for value in report.losses.values())
    assert reports[-1].losses["loss"] < 0.3 * reports[0].losses["loss"]
    assert reports[-1].accuracy > 0.9
    if heads:  # they drop 70 % of what they see, so they are slower
        assert reports[-1].losses["aux1"] + reports[-1].losses["aux2"] < 4.2


@pytest.mark.parametrize("peak_at", [0.3, 0.6])
def test_learning_rate_and_momentum_of_every_step_reach_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, peak_at: float
) -> None:
    dataset, _ = small_shapes(32)
    taken: list[tuple[float, float]] = []
    optimizers: list[optim.SGD] = []

    def step(self: optim.SGD, lr: float, momentum: float) -> None:
        assert all(slot.param.grad is not None for slot in self.slots)
        taken.append((lr, momentum))
        optimizers.append(self)

    monkeypatch.setattr(optim.SGD, "step", step)
    recipe = Recipe(epochs=3, lr=0.2, peak_at=peak_at, weight_decay=0.01)
    model = Net()
    train(model, loader(dataset, 8), recipe, quiet=True)
    total = 12
    lr, momentum = schedule.one_cycle(total, peak_at), schedule.one_cycle_momentum(total, peak_at)
    assert taken == [(0.2 * lr(i), momentum(i)) for i in range(total)]
    assert taken[0] == pytest.approx((0.2 / 25, 0.95))
    assert taken[-1] == pytest.approx((0.2 / 25e4, 0.95))
    assert len({id(optimizer) for optimizer in optimizers}) == 1
    slots = optimizers[0].slots
    assert [slot.param for slot in slots] == list(model.parameters())
    assert all(slot.options["weight_decay"] == 0.01 and slot.options["nesterov"] for slot in slots)


def test_train_is_the_loop_one_would_write_by_hand() -> None:
    """Momentum carries over, gradients do not, and dropout draws by step and picture: three steps agree."""
    dataset, _ = small_shapes(24)
    trained, by_hand = Net(dropout=0.5), Net(dropout=0.5)
    train(trained, loader(dataset, 8, shuffle=True, augment=Augment(), seed=5), Recipe(epochs=1, seed=5), quiet=True)

    optimizer = optim.SGD(by_hand.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    lr, momentum = schedule.one_cycle(3, 0.3), schedule.one_cycle_momentum(3, 0.3)
    for i, batch in enumerate(loader(dataset, 8, shuffle=True, augment=Augment(), seed=5).batches(0)):
        by_hand.set_key(Key(5).fold("dropout").fold(i), batch.rows)
        optimizer.zero_grad()
        ops.cross_entropy(by_hand(to_tensor(batch.images)), batch.labels).backward()
        optimizer.step(lr=0.1 * lr(i), momentum=momentum(i))
    for name, value in by_hand.state_dict().items():
        np.testing.assert_allclose(trained.state_dict()[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_diverging_run_stops_before_the_update_and_names_the_layer() -> None:
    """NumPy's own warnings are turned off for the overflow."""
    dataset, _ = small_shapes(16)
    training = Training(Net(), loader(dataset, 4), Recipe(epochs=1, lr=1e15), quiet=True)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"^fc: linear \(forward\).* in step 3$"):
        training.run()
    assert training.step == 2
    assert all(np.isfinite(parameter.data).all() for parameter in training.model.parameters())


def test_an_error_in_after_epoch_ends_the_run() -> None:
    dataset, _ = small_shapes(8)

    def stop(epoch: Epoch) -> None:
        raise KeyboardInterrupt

    model = Net()
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(dataset, 8), Recipe(epochs=5), quiet=True, after_epoch=stop)
    assert len(model.modes) == 1


# ---- Evaluation ----


def test_evaluate_is_argmax_and_mean_cross_entropy() -> None:
    """Over all pictures alike: the last batch is smaller, and a mean of batch means would be wrong."""
    _, test = small_shapes(8, 23)
    batches = loader(test, 10)
    model = create_model("googlenet_small", aux_logits=True).eval()
    pictures = np.concatenate([batch.images for batch in batches.batches(0)])
    logs = log_softmax(to_host(model(to_tensor(pictures)).data))
    result = evaluate(model, batches, quiet=True)
    assert isinstance(result, Evaluation)
    assert result.loss == pytest.approx(-logs[np.arange(23), test.labels].mean(), rel=1e-4)
    assert result.accuracy == (logs.argmax(axis=1) == test.labels).mean()


def test_evaluate_on_every_backend(xp: Any) -> None:
    _, test = small_shapes(8, 10)
    result = evaluate(Net(), loader(test, 4), quiet=True)
    assert type(result.loss) is float
    assert type(result.accuracy) is float
    assert result.loss == pytest.approx(math.log(10), abs=0.5)


@pytest.mark.parametrize("mode", [False, True])
def test_evaluate_leaves_the_model_as_it_was(mode: bool) -> None:
    _, test = small_shapes(8)
    model = Net(dropout=0.5)
    model.train(mode)
    before = model.state_dict()
    first, second = (evaluate(model, loader(test, 8), quiet=True) for _ in range(2))
    assert first == second
    assert set(model.modes) == {False}
    assert [module.training for _, module in model.named_modules()] == [mode] * 5
    after = model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_evaluate_records_no_graph() -> None:
    _, test = small_shapes(8)
    model = Net()
    evaluate(model, loader(test, 8), quiet=True)
    assert len(model.outputs) == 3
    assert all(output.node is None and not output.requires_grad for output in model.outputs)
    assert all(parameter.grad is None for parameter in model.parameters())


def recording() -> bool:
    return (nn.Parameter(np.ones(1, np.float32)) * 2.0).node is not None


def test_only_the_model_runs_without_recording() -> None:
    """Whoever looks at predictions may compute gradients between them, or stop early."""
    _, test = small_shapes(8)
    results = predictions(Net(), loader(test, 8))
    next(results)
    assert recording()
    results.close()
    assert recording()


def test_an_evaluation_that_fails_leaves_mode_and_recording_as_they_were() -> None:
    """Ten labels, three logits. The error is still held when we look, as it is in an interactive session."""
    _, test = small_shapes(8)
    model = Net(classes=3)
    with pytest.raises(MinigradError, match="label") as caught:
        evaluate(model, loader(test, 8), quiet=True)
    assert model.training
    assert recording()
    assert caught.value.__traceback__ is not None


# ---- A run ----


@pytest.fixture
def tiny_data(monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    data = small_shapes(37, 12)
    monkeypatch.setattr(run_module, "open_data", lambda *_, **__: data)
    return data


def test_same_seed_same_bits_other_seed_other_weights(
    tmp_path: Path, tiny_data: tuple[Dataset, Dataset], threads: None
) -> None:
    """Initial weights, order, augmentation and dropout all follow from the seed; the number of threads does not."""
    results = []
    for name, seed, count in (("a", 1, 1), ("b", 1, 2), ("c", 2, 2)):
        set_num_threads(count)
        options = Run(aux_logits=True, save=tmp_path / name, recipe=Recipe(1, 12, seed=seed), quiet=True)
        result = run(options)
        results.append((load_weights(tmp_path / name)[0], result))
    (first, accuracy), (same, same_accuracy), (other, _) = results
    assert accuracy == same_accuracy
    assert all(np.array_equal(first[name], same[name]) for name in first)
    moved = [name for name in first if first[name].ndim > 1]
    assert all(not np.array_equal(first[name], other[name]) for name in moved)


def test_a_runs_training_batches_are_full_and_its_evaluation_misses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: tuple[Dataset, Dataset]
) -> None:
    batches: list[Any] = []
    evaluated: list[Any] = []

    def step(model: nn.Module, batch: Any, recipe: Recipe) -> Any:
        batches.append(batch)
        return training_step(model, batch, recipe)

    def fake_evaluate(model: nn.Module, loader: Loader, **_: Any) -> Evaluation:
        evaluated.append(sum(len(batch.labels) for batch in loader.batches(0)))
        return Evaluation(1.0, 0.5)

    monkeypatch.setattr(step_module, "training_step", step)
    monkeypatch.setattr(loop_module, "evaluate", fake_evaluate)
    run(Run(save=tmp_path / "w.npz", recipe=Recipe(epochs=2, batch_size=16), quiet=True))
    assert [len(batch.labels) for batch in batches] == [16] * 4
    rows = [set(np.concatenate([b.rows for b in epoch])) for epoch in (batches[:2], batches[2:])]
    assert all(len(epoch) == 32 for epoch in rows)
    assert rows[0] != rows[1]  # shuffled anew, so that no picture is left out for ever
    assert evaluated == [12, 12]


def test_a_runs_file_and_lines(
    tmp_path: Path, tiny_data: tuple[Dataset, Dataset], capfd: pytest.CaptureFixture[str]
) -> None:
    training, _ = tiny_data
    path = tmp_path / "not" / "yet" / "there.npz"
    result = run(Run(save=path, recipe=Recipe(epochs=1, batch_size=16), validation=0.2))
    out, err = capfd.readouterr()
    assert "epoch 1: loss " in out
    assert f"test accuracy {result.accuracy:.2%}" in out
    assert str(path) in out
    assert "epoch 1/1" in err
    assert "evaluate" in err
    assert "Traceback" not in out + err
    _, about = load_weights(path)
    assert about["model"] == "googlenet_small"
    assert about["options"] == {"num_classes": 10, "aux_logits": False, "width": 1.0}
    assert tuple(about["classes"]) == training.classes
    assert about["size"] == [16, 16]
    assert about["test_accuracy"] == result.accuracy


def test_quiet_prints_nothing(
    tmp_path: Path, tiny_data: tuple[Dataset, Dataset], capfd: pytest.CaptureFixture[str]
) -> None:
    run(Run(save=tmp_path / "w.npz", recipe=Recipe(epochs=1, batch_size=16), quiet=True))
    assert capfd.readouterr() == ("", "")


def test_with_validation_the_test_pictures_are_seen_once_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: tuple[Dataset, Dataset]
) -> None:
    watched: list[str] = []
    trained: list[int] = []

    def fake_run(self: Training, **_: Any) -> None:
        assert self.test is not None
        watched.append(self.test.dataset.name)
        trained.append(len(self.loader.dataset))
        self.epochs.append(Epoch(1, 1, 0.1, {"loss": 1.0}, 0.1, 1.0, 1.0, Evaluation(1.0, 0.2)))

    def fake_evaluate(model: nn.Module, loader: Loader, **_: Any) -> Evaluation:
        watched.append(loader.dataset.name)
        return Evaluation(2.0, 0.25)

    monkeypatch.setattr(Training, "run", fake_run)
    monkeypatch.setattr(run_module, "evaluate", fake_evaluate)
    options = Run(save=tmp_path / "w.npz", recipe=Recipe(batch_size=16), validation=0.2, quiet=True)
    assert run(options) == Evaluation(2.0, 0.25)
    assert watched == ["shapes train validation", "shapes test"]
    watched.clear()
    assert run(dataclasses.replace(options, validation=0.0, save=tmp_path / "v.npz")) == Evaluation(1.0, 0.2)
    assert watched == ["shapes test"]
    assert trained == [30, 37]


def test_a_runs_report_shows_the_model_as_it_was_evaluated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: tuple[Dataset, Dataset]
) -> None:
    """In evaluation mode, with the averaged weights: its confusion matrix has the accuracy of the result."""
    report = pytest.importorskip("inception.report")
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []

    def write_report(directory: Path, log: Any, **parts: Any) -> list[Path]:
        drawn.append((directory, log, parts))
        return [tmp_path / "drawn.png"]

    monkeypatch.setattr(report, "write_report", write_report)
    recipe = Recipe(epochs=2, batch_size=16, ema=0.5)
    options = Run(aux_logits=True, out=tmp_path / "run", validation=0.2, recipe=recipe, quiet=True)
    result = run(options)
    ((directory, log, parts),) = drawn
    assert directory == tmp_path / "run"
    assert [row["epoch"] for row in log] == [1, 2]
    assert np.trace(parts["confusion"]) / 12 == result.accuracy
    assert parts["confusion"].sum(axis=1).tolist() == np.bincount(tiny_data[1].labels, minlength=10).tolist()
    assert len(parts["mistakes"]) == 12 - np.trace(parts["confusion"])


def test_too_few_pictures_for_a_batch(tmp_path: Path, tiny_data: tuple[Dataset, Dataset]) -> None:
    with pytest.raises(DataError, match="37 training pictures do not fill a batch of 64: lower the batch size"):
        run(Run(save=tmp_path / "w.npz", recipe=Recipe(batch_size=64), quiet=True))


@pytest.mark.parametrize("name", ["", "x.npz/y.npz", "pipe"])
def test_a_place_that_cannot_be_written_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: tuple[Dataset, Dataset], name: str
) -> None:
    """Hours of training must not end with "is a directory"; and --save /dev/null must not replace the device."""
    (tmp_path / "x.npz").write_bytes(b"")
    if name == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        os.mkfifo(tmp_path / name)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(Training, "run", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises((MinigradError, OSError)):
        run(Run(save=tmp_path / name, recipe=Recipe(epochs=1, batch_size=16), quiet=True))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"batch_size": 0},
        {"lr": math.nan},
        {"lr": -1.0},
        {"lr": math.inf},
        {"weight_decay": -1.0},
        {"peak_at": 1.5},
        {"label_smoothing": 1.0},
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(
    tmp_path: Path, tiny_data: tuple[Dataset, Dataset], wrong: dict[str, Any]
) -> None:
    (name,) = wrong
    with pytest.raises(MinigradError, match=name.replace("_", "[ _]")):
        run(Run(save=tmp_path / "w.npz", recipe=Recipe(**({"epochs": 1, "batch_size": 16} | wrong)), quiet=True))
    assert not (tmp_path / "w.npz").exists()


def test_one_picture_is_no_batch() -> None:
    with pytest.raises(ShapeError, match=r"to_tensor wants a batch \(N, C, H, W\), got \(3, 8, 8\): x\[None\]"):
        to_tensor(np.zeros((3, 8, 8), np.float32))
