"""Recipes, the average of the weights, and the log: what is asked for is what happens, and what is written."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from inception.data import Loader, mean_and_std
from inception.training import RECIPES, Evaluation, Recipe, Run, Training, run
from inception.training.average import Average
from inception.training.log import Log, Row, as_json, row_of
from inception.training.loop import Epoch
from inception.weights import load_weights
from minigrad import nn, optim
from minigrad.backend import asarray, to_host
from minigrad.errors import MinigradError
from minigrad.nn import Parameter

run_module = importlib.import_module("inception.training.run")


# ---- Recipes ----


def test_the_default_is_the_anchors() -> None:
    """SGD with Nesterov momentum and decay on all, one cycle from 0.004 over 0.1 at 30 % to 4e-7, 0.95 … 0.85."""
    recipe, model = RECIPES["cifar_small"], tiny_run.make_model("", num_classes=10, aux_logits=False)
    assert recipe == Recipe()
    optimizer = recipe.make_optimizer(model)
    assert type(optimizer) is optim.SGD
    assert all(slot.options["nesterov"] and slot.options["weight_decay"] == 5e-4 for slot in optimizer.slots)
    lr, momentum = dataclasses.replace(recipe, epochs=10).make_schedules(10)
    assert momentum is not None
    assert (lr(0), lr(29), lr(99)) == pytest.approx((0.004, 0.1, 4e-7))
    assert (momentum(0), momentum(29), momentum(99)) == pytest.approx((0.95, 0.85, 0.95))
    assert (recipe.batch_size, recipe.padding, recipe.flip, recipe.ema) == (128, 4, "random", 0)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_trained_with_and_comes_back_from_json(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    first, _ = tiny_run.make_data("")
    mean, std = mean_and_std(first)
    small = dataclasses.replace(recipe, batch_size=16, epochs=2)
    training = Training(
        tiny_run.make_model("", num_classes=10, aux_logits=True),
        Loader(first, 16, mean=mean, std=std, drop_last=True),
        small,
        quiet=True,
    )
    before = training.model.state_dict()
    training.run()
    after = training.model.state_dict()
    assert all(np.isfinite(value).all() for value in after.values())
    assert all(not np.array_equal(value, before[key]) for key, value in after.items() if value.ndim > 1)


def test_googlenets_rate_falls_by_4_percent_every_8_epochs() -> None:
    lr, momentum = RECIPES["googlenet_2014"].make_schedules(100)
    assert momentum is None
    assert [lr(i) for i in (0, 799, 800, 1600)] == pytest.approx([0.01, 0.01, 0.0096, 0.009216])


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1]),
        ({"schedule": "step", "step_every": 1.0, "step_factor": 0.5}, [1, 0.5, 0.25, 0.125, 0.0625]),
        ({"schedule": "step", "step_at": (1.0, 3), "step_factor": 0.1}, [1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "poly", "power": 0.5}, [1, math.sqrt(0.75), math.sqrt(0.5), 0.5, 0]),
        ({"schedule": "cosine", "lr_end": 0.0}, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5), 0]),
        ({"schedule": "constant", "warm_up": 2.0}, [1 / 20, 11 / 20, 1, 1, 1]),
    ],
)
def test_schedules_by_name(options: dict[str, Any], factors: list[float]) -> None:
    """At the beginning of each of four epochs of ten steps, and after the last."""
    lr, momentum = Recipe(epochs=4, lr=2.0, **options).make_schedules(10)
    assert [lr(step) for step in range(0, 41, 10)] == pytest.approx([2 * factor for factor in factors])
    assert momentum is None


@pytest.mark.parametrize(
    ("options", "kind", "wanted"),
    [
        ({"optimizer": "muon", "momentum": 0.5}, optim.Muon, {"momentum": 0.5}),
        ({"optimizer": "sgd", "momentum": 0.5, "nesterov": False}, optim.SGD, {"momentum": 0.5, "nesterov": False}),
        (
            {"optimizer": "rmsprop", "rms_decay": 0.8, "eps": 1.0},
            optim.RMSProp,
            {"decay": 0.8, "eps": 1.0, "momentum": 0.9},
        ),
        (
            {"optimizer": "adamw", "beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
            optim.AdamW,
            {"betas": (0.8, 0.9), "eps": 1e-3},
        ),
    ],
)
def test_optimizers_by_name(options: dict[str, Any], kind: type, wanted: dict[str, Any]) -> None:
    model = tiny_run.make_model("", num_classes=10, aux_logits=False)
    optimizer = Recipe(weight_decay=0.01, schedule="cosine", **options).make_optimizer(model)
    assert type(optimizer) is kind
    assert all(slot.options == wanted | {"weight_decay": 0.01} for slot in optimizer.slots)
    spared = Recipe(weight_decay=0.01, schedule="cosine", spare_norms=True, **options).make_optimizer(model)
    assert {(s.param.data.ndim > 1, s.options["weight_decay"]) for s in spared.slots} == {(True, 0.01), (False, 0.0)}


@pytest.mark.parametrize(
    ("options", "moved"),
    [({"momentum": 0.5}, "momentum"), ({"optimizer": "adamw", "beta1": 0.8}, "beta1")],
)
def test_one_cycle_does_not_ignore_a_momentum(options: dict[str, Any], moved: str) -> None:
    with pytest.raises(MinigradError, match=f"one_cycle moves {moved} from momentum_high to momentum_low"):
        Recipe(**options).check_momentum()
    with pytest.raises(MinigradError, match=f"one_cycle moves {moved}"):
        run(Run(recipe=Recipe(**options)))  # and nothing is begun


def test_a_long_gradient_is_clipped_to_the_recipes_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    plain = optim.SGD.step

    def step(self: optim.SGD, **options: Any) -> None:
        before = np.concatenate([slot.param.data.ravel() for slot in self.slots])
        plain(self, **options)
        moved = np.concatenate([slot.param.data.ravel() for slot in self.slots]) - before
        norms.append(float(np.linalg.norm(moved)) / options["lr"])

    monkeypatch.setattr(optim.SGD, "step", step)
    first, _ = tiny_run.make_data("")
    mean, std = mean_and_std(first)
    for clip in (0.0, 0.01):
        model = tiny_run.make_model("", num_classes=10, aux_logits=False)
        recipe = Recipe(epochs=1, clip_norm=clip, momentum=0.0, nesterov=False, weight_decay=0.0)
        Training(model, Loader(first, 16, mean=mean, std=std), recipe, quiet=True).run()
    assert norms[0] > 0.02
    clipped = norms[len(norms) // 2 : -1]  # but for the last step, whose learning rate is lost in float32's rounding
    assert clipped == pytest.approx([0.01] * len(clipped), rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 1.5},
        {"epochs": True},
        {"epochs": 10**400},
        {"lr": "high"},
        {"lr": math.inf},
        {"lr": None},
        {"optimizer": "adam"},
        {"schedule": ""},
        {"flip": True},
        {"augment": 1},
        {"step_at": [1.0]},
        {"step_at": ("one",)},
        {"step_at": (3.0, 1.0)},
        {"step_every": 0.0},
        {"resized_crop": (0.5,)},
        {"resized_crop": (1.0, 0.5)},
        {"resized_crop": (0.5, 1.5)},
        {"ema": 1.0},
        {"ema_every": 0},
        {"momentum": 0.0, "nesterov": True},
        {"seed": 0.5},
    ],
)
def test_an_option_of_the_wrong_kind_or_size_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(MinigradError, match=next(iter(wrong))):
        Recipe(**wrong)


# ---- The average of the weights ----


class Two(nn.Module):
    """A parameter with a layout of its own, and batch norm, which has buffers."""

    def __init__(self) -> None:
        self.weight = Parameter(asarray(np.zeros((2, 4, 4, 3), np.float32)).transpose(0, 3, 1, 2))
        self.norm = nn.BatchNorm2d(2)


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_weighted_mean_of_all_that_was_seen(xp: Any, every: int) -> None:
    model, decay = Two(), 0.8
    average = Average(model, decay, every)
    rng = np.random.default_rng(0)
    seen: list[dict[str, np.ndarray]] = []
    arrays = {name: id(x) for name, x in average.sums.items()}
    for step in range(10):
        for _, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data[...] = asarray(rng.normal(size=tensor.shape).astype(np.float32))
        if (step + 1) % every == 0:
            seen.append(model.state_dict())
        average.update(step)
    assert arrays == {name: id(x) for name, x in average.sums.items()}  # in place
    shares = np.array([decay ** (every * age) for age in range(len(seen))])[::-1]
    before = {name: tensor.data for name, tensor in model.named_parameters()}
    with average.applied():
        now = model.state_dict()
        strides = {name: tensor.data.strides for name, tensor in model.named_parameters()}
    assert len(now) == 5
    for name, value in now.items():
        wanted = np.tensordot(shares / shares.sum(), np.stack([state[name] for state in seen]).astype(float), 1)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
        assert value.dtype == np.float32
    for name, tensor in model.named_parameters():
        assert tensor.data is before[name]
        assert tensor.data.strides == strides[name]


def test_the_weights_come_back_after_an_error_too() -> None:
    model = Two()
    average = Average(model, 0.5)
    average.update(0)
    before = model.weight.data

    def fail() -> None:
        with average.applied():
            assert model.weight.data is not before
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert model.weight.data is before


def test_before_the_first_update_the_average_is_the_weights() -> None:
    model = Two()
    with Average(model, 0.5).applied():
        assert np.isfinite(to_host(model.norm.running_var.data)).all()
        np.testing.assert_array_equal(to_host(model.norm.running_var.data), 1)


def test_an_update_waits_for_nothing(xp: Any) -> None:
    import fake_cupy

    model = Two()
    average = Average(model, 0.9)
    fake_cupy.SYNCS.clear()
    for step in range(3):
        average.update(step)
    assert not fake_cupy.SYNCS


def test_the_file_holds_the_average_and_the_result_is_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "create_model", tiny_run.make_model)
    monkeypatch.setattr(run_module, "open_data", tiny_run.make_data)
    results, files = {}, {}
    for ema in (0.0, 0.9):
        recipe = Recipe(epochs=3, batch_size=8, lr=0.2, ema=ema)
        results[ema] = run(Run(recipe=recipe, save=tmp_path / f"{ema}.npz", quiet=True))
        files[ema] = load_weights(tmp_path / f"{ema}.npz")
    assert files[0.0][1]["weights"] == "as trained"
    assert "decay 0.9" in files[0.9][1]["weights"]
    assert all(not np.array_equal(files[0.0][0][name], x) for name, x in files[0.9][0].items())
    assert results[0.0].loss != results[0.9].loss
    assert [about["test_accuracy"] for _, about in files.values()] == [r.accuracy for r in results.values()]


# ---- The log ----


def epoch(number: int, loss: float = 0.5) -> Epoch:
    return Epoch(number, 10 * number, 0.1, {"loss": loss, "aux1": 1.5, "aux2": 2.5}, 0.75, 2.0, 40.0,
                 Evaluation(0.25, 0.875), Evaluation(0.2, 0.9) if number == 2 else None)  # fmt: skip


def rows(n: int) -> list[Row]:
    return [row_of(epoch(i + 1), average=True) for i in range(n)]


def test_a_row_an_epoch_in_both_files(tmp_path: Path) -> None:
    log = Log(tmp_path, pytest.fail)
    for n in (1, 2):
        log.write(rows(n))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == rows(2)
    assert list(lines[0]) == [
        *("epoch", "step", "lr", "loss", "aux1", "aux2", "accuracy", "test_loss", "test_accuracy"),
        *("ema_test_loss", "ema_test_accuracy", "seconds", "pictures_per_second"),
    ]
    assert (lines[0]["ema_test_loss"], lines[1]["ema_test_loss"]) == (None, 0.2)
    with (tmp_path / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) if v else None for k, v in row.items()} for row in table] == lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.jsonl"]


def test_the_validation_pictures_are_called_so() -> None:
    assert {"validation_loss", "validation_accuracy"} <= row_of(epoch(1), watched="validation").keys()
    assert not any(name.startswith(("test", "ema")) for name in row_of(epoch(1), watched="validation"))


def test_a_loss_that_is_no_number_is_null_in_json() -> None:
    text = as_json(dict(row_of(epoch(1, math.nan))))
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_a_log_that_cannot_be_written_is_a_warning_and_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    log = Log(tmp_path, warnings.append)
    log.write(rows(1))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log.write(rows(2))
    assert len(warnings) == 2
    assert "No space left" in warnings[0]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    log.write(rows(3))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


class Writer:
    """Stands in for a SummaryWriter: remembers what it is told."""

    def __init__(self, directory: str, purge_step: int) -> None:
        self.directory, self.purge_step = directory, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("module", ["tensorboardX", "torch.utils.tensorboard"])
def test_tensorboard_events_of_every_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        stand_in = type(sys)(name)
        stand_in.SummaryWriter = Writer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, stand_in if name == module else None)
    log = Log(tmp_path, pytest.fail, tensorboard=True)
    log.write(rows(1))
    log.write(rows(2))
    log.close()
    events = log.events
    assert (events.directory, events.purge_step, events.closed) == (str(tmp_path / "events"), 1, True)
    losses = [(value, step) for name, value, step in events.scalars if name == "loss"]
    assert losses == [(0.5, 10), (0.5, 20)]
    assert [step for name, _, step in events.scalars if name == "ema_test_loss"] == [20]

    again = Log(tmp_path, pytest.fail, tensorboard=True, step=20)  # resumed there
    again.write(rows(2))
    again.write(rows(3))
    assert again.events.purge_step == 21
    assert {step for _, _, step in again.events.scalars} == {30}


def test_without_tensorboard_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MinigradError, match="pip install tensorboardX"):
        Log(tmp_path, pytest.fail, tensorboard=True)
