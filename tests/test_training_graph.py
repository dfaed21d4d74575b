"""The training step as one CUDA graph: on the stand-in for CuPy, whose graphs repeat calls at the same addresses."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import re
import signal
import weakref
from pathlib import Path
from typing import Any

import fake_cupy
import fake_graph
import numpy as np
import pytest
import tiny_run

from inception.data import Augment, Loader, mean_and_std
from inception.training import Recipe, Training
from inception.training.graph import WARM_UP
from inception.training.loop import Stopped, training_step
from minigrad import nn, ops, watch
from minigrad.backend import array_module, set_backend, set_precision, to_host
from minigrad.kernels.cuda import cublas, launch
from minigrad.random import Key, normal
from minigrad.tensor import Tensor
from minigrad.watch import untouched

on_fake = pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
run_module = importlib.import_module("inception.training.run")

RECIPE = Recipe(epochs=2, batch_size=8, clip_norm=0.5, ema=0.9, seed=3)  # dropout, two heads, momentum along a cycle
RECIPES = {
    "sgd": RECIPE,
    "average every fifth step": dataclasses.replace(RECIPE, ema_every=5),
    "adamw": dataclasses.replace(RECIPE, optimizer="adamw", spare_norms=True, label_smoothing=0.1),
    "rmsprop": dataclasses.replace(RECIPE, optimizer="rmsprop", schedule="step", clip_norm=0.0, eps=1.0),
    "muon": dataclasses.replace(RECIPE, optimizer="muon", schedule="poly", clip_norm=0.0),
    "no average": dataclasses.replace(RECIPE, ema=0.0, warm_up=1.0),
}


def make(recipe: Recipe = RECIPE, heads: bool = True, drop_last: bool = True, **options: Any) -> Training:
    first, second = tiny_run.make_data("")
    mean, std = mean_and_std(first)
    loader = Loader(first, 8, mean=mean, std=std, seed=1, augment=Augment(1), shuffle=True, drop_last=drop_last)
    tests = Loader(second, 8, mean=mean, std=std)
    model = tiny_run.make_model("", num_classes=10, aux_logits=heads)
    return Training(model, loader, recipe, test=tests, quiet=True, **options)


def outcome(training: Training) -> dict[str, Any]:
    """All that a training has come to, to the last bit; but for the time that it took."""
    arrays: dict[str, Any] = dict(training.model.state_dict())
    arrays |= {f"optimizer {name}": to_host(x) for name, x in training.optimizer.state_dict().items()}
    if training.average is not None:
        arrays |= {f"average {name}": to_host(x) for name, x in training.average.sums.items()}
        arrays["count"] = np.array(training.average.count)
    found = {name: x.tobytes() for name, x in arrays.items()}
    for epoch in training.epochs:
        found[f"epoch {epoch.number}"] = epoch._replace(seconds=0, pictures_per_second=0)
    return found


def trained(graph: bool, recipe: Recipe = RECIPE, **options: Any) -> dict[str, Any]:
    training = make(recipe, graph=graph, **options)
    training.run()
    if graph:
        assert training.graphed is not None
        assert training.graphed.graph is not None, training.graphed.off
    return outcome(training)


@functools.cache
def eager(recipe: Recipe = RECIPE, heads: bool = True) -> dict[str, Any]:
    return trained(False, recipe, heads=heads)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


# ---- The same bits ----


@on_fake
@pytest.mark.parametrize("heads", [True, False], ids=["heads", "no heads"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_graph_trains_to_the_same_bits(xp: Any, recipe: Recipe, heads: bool) -> None:
    """Weights, statistics, the optimizer's state, averages; losses, accuracies and evaluations of two epochs."""
    assert differences(trained(True, recipe, heads=heads), eager(recipe, heads)) == []


@on_fake
def test_an_average_may_begin_after_the_capture(xp: Any) -> None:
    """Its kernel is then loaded before: a capture cannot."""
    launch.plan.cache_clear()  # as in a process where nothing has averaged yet
    trained(True, RECIPES["average every fifth step"])


@on_fake
def test_every_step_has_the_losses_of_its_own(xp: Any) -> None:
    courses = []
    for graph in (True, False):
        course: list[Any] = []
        training = make(graph=graph)
        training.run(after_step=lambda t=training, c=course: c.append((t.sums.means(), t.sums.accuracy(), t.step)))  # type: ignore[misc]
        courses.append(course)
    assert len(courses[0]) == RECIPE.epochs * tiny_run.STEPS
    assert len({means["loss"] for means, _, _ in courses[0]}) == len(courses[0])
    assert courses[0] == courses[1]


@on_fake
def test_masks_differ_from_step_to_step(xp: Any) -> None:
    """A graph that drew the same mask for ever would still learn: another seed must change what is dropped."""
    results = [trained(True, dataclasses.replace(RECIPE, clip_norm=0.0, seed=seed)) for seed in (3, 4)]
    assert differences(*results) != []


# ---- What a replay takes ----


@on_fake
def test_a_replayed_step_is_its_writes_and_one_launch(xp: Any) -> None:
    training, counts, waits = make(graph=True), [], []

    def after_step() -> None:
        counts.append(dict(fake_cupy.LAUNCHES))
        waits.append(dict(fake_cupy.SYNCS))
        fake_cupy.LAUNCHES.clear()
        fake_cupy.SYNCS.clear()

    fake_cupy.LAUNCHES.clear()
    fake_cupy.SYNCS.clear()
    training.run(after_step=after_step)
    views = {"transpose", "reshape", "ascontiguousarray"}  # of what lies so already: no work
    replays = counts[WARM_UP + 1 : tiny_run.STEPS]
    steady = [{name: n for name, n in count.items() if name not in views} for count in replays]
    # The batch is made of resident pictures (asarray: its changes) and copied; labels, rows, keys and numbers are set.
    assert steady == [{"asarray": 1, "augment": 1, "setitem": 1, "set": 4, "graph": 1}] * len(steady)
    assert len(steady) == 2
    assert all(count["graph"] == 1 for count in counts[WARM_UP:])
    assert sum("sgd" in count for count in counts) == WARM_UP + 1  # as ever, and for the capture
    assert not any(waits[: tiny_run.STEPS])


@on_fake
def test_nothing_of_an_epoch_waits_more_often_than_without(xp: Any) -> None:
    waits = []
    for graph in (True, False):
        fake_cupy.SYNCS.clear()
        make(graph=graph).run()
        waits.append(sum(fake_cupy.SYNCS.values()))
    assert waits[0] == waits[1]


@on_fake
def test_what_the_stream_outside_has_begun_is_waited_for_and_the_other_way_round(xp: Any) -> None:
    training, null = make(graph=True), fake_cupy.Stream.null
    assert training.graphed is not None
    with training.graphed.on_its_stream():
        stream = fake_cupy.get_current_stream()
        assert stream is training.graphed.stream
        assert stream.clock[null] == null.clock[null] > 0
        xp.zeros(1).fill(1)
    assert fake_cupy.get_current_stream() is null
    assert null.clock[stream] == stream.clock[stream] > 0


# ---- Between the steps ----


@on_fake
@pytest.mark.parametrize(
    ("stop_at", "graphs"),
    [(stop_at, (True, True)) for stop_at in (1, WARM_UP, WARM_UP + 1, tiny_run.STEPS)]
    + [(8, (True, False)), (8, (False, True))],
)
def test_a_run_goes_on_where_it_was_stopped(
    xp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, graphs: tuple[bool, bool]
) -> None:
    """Also with a graph where there was none, and without where there was one."""
    monkeypatch.setattr(run_module, "create_model", tiny_run.make_model)
    monkeypatch.setattr(run_module, "open_data", tiny_run.make_data)
    tiny_run.run(tiny_run.options(tmp_path / "whole"))

    def check(self: Training) -> None:
        if self.step == stop_at:
            raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "check", check)
        with pytest.raises(Stopped, match="go on with"):
            tiny_run.run(tiny_run.options(tmp_path / "parts", graph=graphs[0]))
    tiny_run.go_on(tmp_path / "parts", graph=graphs[1])
    tiny_run.assert_same(tmp_path / "parts", tiny_run.outcome(tmp_path / "whole"))


@on_fake
def test_steps_of_another_size_are_taken_as_ever_in_between(xp: Any) -> None:
    """50 pictures in batches of 8, the last of 2: gradients then lie elsewhere, and the next replay finds its own."""
    results = []
    for graph in (True, False):
        training = make(graph=graph, drop_last=False)
        training.run()
        results.append(outcome(training))
    assert differences(*results) == []


@on_fake
def test_looking_at_the_model_between_steps_changes_nothing(xp: Any) -> None:
    """Whoever evaluates, computes gradients, draws random numbers or averages in between gets memory of their own."""
    results = []
    for look in (True, False):
        training = make(graph=True)
        kept: list[Any] = []

        def after_step(training: Training = training, look: bool = look, kept: list[Any] = kept) -> None:
            if look:
                with untouched(training.model), training.averaged():
                    kept.append((training.some_pictures(), xp.ones((8, 3, 16, 16), "float32"), xp.ones(6)))
                    training_step(training.model, next(training.loader.batches(0)), RECIPE)
                training.model.zero_grad()

        training.run(after_step=after_step)
        results.append(outcome(training))
        assert all((to_host(x) == 1).all() for _, *ones in kept for x in ones)
    assert differences(*results) == []


# ---- What changes between two epochs ----


def with_new_arrays(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data = parameter.data.copy(order="K")


def with_fixed_parameters(training: Training) -> None:
    for parameter in list(training.model.parameters())[:4]:
        parameter.requires_grad = False


def with_another_dropout(training: Training) -> None:
    training.model.dropout = nn.Dropout(0.9)


def with_more_dropout(training: Training) -> None:
    training.model.dropout.p = 0.9


CHANGES = {
    "arrays": with_new_arrays,
    "what is trained": with_fixed_parameters,
    "frozen": lambda training: training.model.conv.freeze(),
    "a layer": with_another_dropout,
    "an option": with_more_dropout,
    "precision": lambda training: set_precision("tf32"),
}


@on_fake
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_two_epochs_is_seen(xp: Any, change: Any) -> None:
    """The graph has written to memory that may be somebody else's by now, and repeats what was so: it is made anew."""
    results = []
    for graph in (True, False):
        training = make(dataclasses.replace(RECIPE, ema=0.0), graph=graph)
        before = []

        def after_epoch(epoch: Any, training: Training = training, before: list[Any] = before) -> None:
            if epoch.number == 1:
                change(training)
                before.append(training.graphed and training.graphed.graph)

        training.run(after_epoch=after_epoch)
        results.append(outcome(training))
        if graph:
            assert training.graphed is not None
            assert training.graphed.graph is not None
            assert training.graphed.graph is not before[0]
        set_precision("float32")
    assert differences(*results) == []


@on_fake
def test_trainings_share_a_stream_and_leave_no_memory(xp: Any) -> None:
    """cuBLAS keeps a workspace for each stream; what a graph computes with is its pool's, which goes with it."""
    trained(True)
    sessions = cublas.session.cache_info().currsize
    gc.disable()
    try:
        training = make(graph=True)
        training.run()
        pool = weakref.ref(training.graphed.pool)  # type: ignore[union-attr]
        del training
        trained(True)  # the next capture takes back what the last one had
        assert pool() is None
    finally:
        gc.enable()
    assert cublas.session.cache_info().currsize == sessions


# ---- Taken one by one, and why ----


class Own(nn.Dropout):
    """A layer that asks the device for a number."""

    def forward(self, x: Tensor) -> Tensor:
        float(x.data.sum())
        return super().forward(x)


def with_own(training: Training) -> None:
    training.model.dropout = Own(0.3)


class Counting(nn.Module):
    """A layer that draws by a key of its own, another at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self.calls += 1
        return ops.dropout(x, 0.3, Key(5).fold(self.calls))


class Noise(nn.Module):
    """A layer that folds its key, which one that is stored on the device does not let itself be."""

    key: Any = None
    rows: Any = None

    def take_key(self, key: Key, rows: Any) -> None:
        self.key, self.rows = key, rows

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        xp = array_module(x.data)
        return x + Tensor(0.1 * normal(self.key, x.shape, rows=self.rows, xp=xp).astype(x.dtype))


def counting(training: Training) -> None:
    training.model.dropout = Counting()


def with_noise(training: Training) -> None:
    training.model.dropout = Noise()


def recomputing(training: Training) -> None:
    training.model.conv.recompute = True


def with_little_memory(training: Training) -> None:
    compute = training.compute

    def wanting(batch: Any) -> None:
        fake_cupy._runtime.free = 100 if fake_graph.recording() else 79 * 10**9
        compute(batch)

    training.compute = wanting  # type: ignore[method-assign]


def with_another_layout(training: Training) -> None:
    weight = training.model.conv.weight
    weight.data = weight.data.copy("C")


REASONS = {
    "layout": (RECIPE, with_another_layout, "SGD has no kernel that updates parameter 0"),
    "recompute": (RECIPE, recomputing, "conv is recomputed to save memory, and a graph takes more of it"),
    "an error": (RECIPE, with_own, "the host waits for the device"),
    "a key of its own": (RECIPE, counting, "numbers are drawn by a key that a graph would repeat as it is"),
    "a key that is folded": (RECIPE, with_noise, "DtypeError .dropout: a stored key cannot be folded"),
    "no memory": (RECIPE, with_little_memory, "a graph has memory of its own, .* too little is free: .*StandIn2"),
}


@on_fake
@pytest.mark.parametrize("why", REASONS)
def test_a_step_that_cannot_be_captured(xp: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, why: str) -> None:
    """The reason is said once, and the results are those without: nothing counts twice, nothing is lost."""
    monkeypatch.setattr(fake_cupy._runtime, "free", 79 * 10**9)
    recipe, change, reason = REASONS[why]
    results = []
    for graph in (True, False):
        training = make(recipe, graph=graph)
        if change is not None:
            change(training)
        training.run()
        results.append(outcome(training))
    assert differences(*results) == []
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: the steps are not captured in a CUDA graph but taken one by one: ")
    assert re.search(reason, said), said


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("xp", ["numpy", "fake_cupy"], indirect=True)
def test_a_run_on_a_gpu_is_captured_unless_told_otherwise(
    xp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool | None
) -> None:
    """And evaluates more pictures at once."""
    seen: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def training(*args: Any, test: Loader, graph: bool, **options: Any) -> None:
        seen.update(graph=graph, at_once=test.batch_size, pixels=test.dataset.images[0, ..., 0].size)
        raise Enough

    monkeypatch.setattr(run_module, "Training", training)
    with pytest.raises(Enough):
        run_module.run(tiny_run.options(tmp_path / "run", graph=asked))
    on_gpu = xp is not np
    assert seen["graph"] == (on_gpu if asked is None else asked)
    more = run_module.EVALUATED_PIXELS // seen["pixels"]
    assert more > tiny_run.RECIPE.batch_size
    assert seen["at_once"] == (more if on_gpu else tiny_run.RECIPE.batch_size)


@on_fake
def test_whoever_watches_sees_every_step(xp: Any, capsys: Any) -> None:
    training = make(graph=True)
    with watch(training.model) as checked:
        training.run()
    assert checked["forward"] > RECIPE.epochs * tiny_run.STEPS * 5
    assert "the model is being watched" in capsys.readouterr().err
    assert differences(outcome(training), eager()) == []


def test_on_the_host_there_are_no_graphs(capsys: Any) -> None:
    set_backend("numpy")
    training = make(graph=True)
    training.run()
    assert "the backend is numpy, and CUDA graphs are for a GPU (--backend cupy)" in capsys.readouterr().err
    assert differences(outcome(training), trained(False)) == []


# ---- The stand-in: what CUDA refuses is refused ----


def capture(xp: Any, work: Any) -> Any:
    stream, pool = fake_cupy.Stream(non_blocking=True), fake_graph.MemoryPool(fake_cupy.Memory)
    with stream:
        stream.begin_capture()
        try:
            with fake_cupy.cuda.using_allocator(pool.malloc):
                work()
        finally:
            graph = stream.end_capture()
    return graph, pool


MISTAKES = {
    "waiting": lambda x: float(x[0]),
    "synchronising": lambda x: fake_cupy.get_current_stream().synchronize(),
    "reading": lambda x: x.get(),
    "uploading": lambda x: x.set(np.zeros(4)),
    "asarray of the host": lambda x: fake_cupy.asarray(np.zeros(4)),
    "asarray of a number": lambda x: fake_cupy.asarray(1.0),
    "CuPy's product": lambda x: x @ x,
    "many at once": lambda x: fake_cupy.concatenate([x] * 9),
    "the usual stream": lambda x: on_null(x),
}


def on_null(x: Any) -> None:
    with fake_cupy.Stream.null:
        x += 1


@on_fake
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_captured_is_refused(xp: Any, mistake: str) -> None:
    x = xp.ones(4)
    with pytest.raises((RuntimeError, NotImplementedError), match="captur"):
        capture(xp, lambda: MISTAKES[mistake](x))
    assert not fake_graph.recording()
    np.testing.assert_array_equal(x.get(), 1)


@on_fake
def test_a_capture_runs_nothing_and_a_replay_runs_it_again_in_place(xp: Any) -> None:
    x, y = xp.ones(4), xp.zeros((2, 4))
    found = {}

    def work() -> None:
        found["fresh"] = x * 2
        y[1] = found["fresh"] + xp.arange(4)
        x.fill(3)

    graph, pool = capture(xp, work)
    assert np.isnan(found["fresh"].get()).all()
    np.testing.assert_array_equal([x.get(), *y.get()], [[1] * 4, [0] * 4, [0] * 4])
    for expected in (2, 6):
        graph.launch()
        np.testing.assert_array_equal(found["fresh"].get(), expected)
        np.testing.assert_array_equal(y.get(), [[0] * 4, expected + np.arange(4)])
    del pool


@on_fake
def test_a_graph_notices_memory_that_is_gone(xp: Any) -> None:
    x = [xp.ones(4)]

    def work() -> None:
        x[0] += 1

    graph, pool = capture(xp, work)
    del x[0]
    with pytest.raises(RuntimeError, match="memory that was given back"):
        graph.launch()
    kept = xp.ones(4)
    graph, pool = capture(xp, lambda: kept.__iadd__(kept * 2))
    graph.launch()
    np.testing.assert_array_equal(kept.get(), 3)
    del pool
    with pytest.raises(RuntimeError, match="memory that was given back"):
        graph.launch()


@on_fake
def test_a_pool_hands_out_what_has_come_back(xp: Any) -> None:
    seen = []

    def work() -> None:
        seen.append(xp.zeros(4).data.ptr)
        kept = xp.zeros(4)
        seen.extend([kept.data.ptr, xp.zeros(4).data.ptr])

    capture(xp, work)
    assert seen[0] == seen[1] != seen[2]
