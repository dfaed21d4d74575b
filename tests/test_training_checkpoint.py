"""Checkpoints: a training that was stopped anywhere goes on bit for bit, and nothing that can happen to a disk or a
file loses more than it must or tells less than a sentence."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from tiny_run import OPTIONS, STEPS

from inception.__main__ import main
from inception.data import Loader, mean_and_std
from inception.training import Recipe, Run, Stopped, Training, open_checkpoint, resumed, run
from inception.training.checkpoint import BEST, CheckpointError, find_checkpoints, restore
from inception.training.run import FREE
from inception.weights import CHECKPOINT, WeightsError, load_weights, read_arrays
from minigrad import num_threads, set_num_threads
from minigrad.errors import MinigradError, NonFiniteError

run_module = importlib.import_module("inception.training.run")
loop_module = importlib.import_module("inception.training.loop")
checkpoint_module = importlib.import_module("inception.training.checkpoint")
ROOT = Path(__file__).parents[1]
RECIPE = Recipe(epochs=4, batch_size=8, ema=0.9, ema_every=2, clip_norm=1.0, seed=3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_module, "create_model", tiny_run.make_model)
    monkeypatch.setattr(run_module, "open_data", tiny_run.make_data)
    before = num_threads()
    yield
    set_num_threads(before)


def options(out: Path, **changes: Any) -> Run:
    defaults: dict[str, Any] = {"aux_logits": True, "recipe": RECIPE, "save_every": 2, "report": False, "quiet": True}
    return Run(out=out, **defaults | changes)


def go_on(where: Path, **given: Any) -> None:
    checkpoint = open_checkpoint(where)
    run(resumed(checkpoint, {"quiet": True} | given), checkpoint)


def timeless(value: Any) -> Any:
    """A JSON value without what the clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "pictures_per_second")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def outcome(out: Path) -> dict[str, Any]:
    """All that a run leaves: every array to the last bit, what describes them, and the log."""
    found: dict[str, Any] = {}
    for path in (out / "weights.npz", out / BEST, *find_checkpoints(out)[:1]):
        for name, array in read_arrays(path).items():
            described = name.endswith(".json")
            value = timeless(json.loads(str(array))) if described else (array.dtype.str, array.shape, array.tobytes())
            if name == CHECKPOINT:  # these may differ between runs of the same training
                for option in FREE:
                    del value["run"]["options"][option]
            found[f"{path.name}: {name}"] = value
    found["log"] = [timeless(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]
    table = (out / "log.csv").read_text().splitlines()
    found["table"] = [row.split(",")[:-2] for row in table]
    return found


def assert_same(out: Path, reference: dict[str, Any]) -> None:
    found = outcome(out)
    assert found.keys() == reference.keys()
    assert [name for name in reference if found[name] != reference[name]] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "create_model", tiny_run.make_model)
        patch.setattr(run_module, "open_data", tiny_run.make_data)
        out = tmp_path_factory.mktemp("whole") / "run"
        run(options(out))
    return out


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask a training to stop once it has taken so many steps, as a signal would."""

    def arrange(steps: int, number: int = signal.SIGTERM) -> None:
        plain = Training._update

        def update(self: Training) -> None:
            plain(self)
            if self.step + 1 == steps:
                self.stopping = number

        monkeypatch.setattr(Training, "_update", update)

    return arrange


# ---- Going on ----


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("steps", [1, 2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 4 * STEPS - 1, 4 * STEPS])
def test_a_stopped_run_goes_on_to_the_last_bit(
    whole: Path, tmp_path: Path, stop_after: Any, steps: int, prefetch: int
) -> None:
    """Between epochs, inside them, before an evaluation, and when all steps are taken but the last evaluation."""
    out = tmp_path / "run"
    stop_after(steps)
    with pytest.raises(Stopped) as stop:
        run(options(out, prefetch=prefetch))
    assert stop.value.signal == signal.SIGTERM
    assert f"saved up to step {steps}: go on with python -m inception train --resume {out}" in str(stop.value)
    assert not (out / "weights.npz").exists()
    stop_after(-1)
    go_on(out)
    assert_same(out, outcome(whole))


def test_stopped_at_every_step_in_turn(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes a single step: nothing but the file carries over."""
    out = tmp_path / "run"
    plain = Training._update

    def update(self: Training) -> None:
        plain(self)
        self.stopping = signal.SIGINT

    monkeypatch.setattr(Training, "_update", update)
    with pytest.raises(Stopped):
        run(options(out))
    for _ in range(4 * STEPS - 1):
        with pytest.raises(Stopped):
            go_on(out)
    go_on(out)
    assert_same(out, outcome(whole))


def test_two_epochs_and_two_are_four(whole: Path, tmp_path: Path) -> None:
    """From the checkpoint that stands after an epoch, among later ones: the log is cut back to it."""
    out = tmp_path / "run"
    run(options(out, keep=99))
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    reference = outcome(out)
    rows: list[int] = []
    plain = Training.run

    def look_and_run(self: Training, **hooks: Any) -> None:
        rows.append(len((out / "log.jsonl").read_text().splitlines()))
        rows.append(len((out / "log.csv").read_text().splitlines()))
        plain(self, **hooks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run", look_and_run)
        go_on(out / f"checkpoint-{2 * STEPS:08d}.npz")
    assert rows == [2, 3]
    assert_same(out, reference)
    assert_same(out, outcome(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "rmsprop", "momentum": 0.9, "schedule": "step", "step_every": 0.5, "ema": 0.0, "lr": 0.01},
        {"optimizer": "adamw", "schedule": "cosine", "warm_up": 1.0, "spare_norms": True, "lr": 0.01},
        {"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "schedule": "constant", "clip_norm": 0.0},
    ],
    ids=lambda change: change["optimizer"],
)
def test_every_optimizer_goes_on_to_the_last_bit(tmp_path: Path, stop_after: Any, change: dict[str, Any]) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=2, **change)
    run(options(tmp_path / "whole", recipe=recipe, validation=0.2))
    stop_after(STEPS + 2)
    with pytest.raises(Stopped):
        run(options(tmp_path / "run", recipe=recipe, validation=0.2))
    stop_after(-1)
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (1, 4), (2, 4)])
def test_threads_prefetching_and_the_rhythm_of_saving_change_nothing(
    whole: Path, tmp_path: Path, threads: int, prefetch: int
) -> None:
    set_num_threads(threads)
    run(options(tmp_path / "run", save_every=5, keep=1, prefetch=prefetch))
    assert_same(tmp_path / "run", outcome(whole))
    assert len(find_checkpoints(tmp_path / "run")) == 1


def test_on_every_backend(xp: Any, tmp_path: Path, stop_after: Any) -> None:
    """Written from the device and put back there; a checkpoint of one backend can be read on another."""
    recipe = dataclasses.replace(RECIPE, epochs=1)
    run(options(tmp_path / "whole", recipe=recipe))
    stop_after(3)
    with pytest.raises(Stopped):
        run(options(tmp_path / "run", recipe=recipe))
    stop_after(-1)
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_a_stop_during_the_evaluation_leaves_the_weights_as_trained(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation looks at the averaged weights; what is saved then must not be those."""
    out = tmp_path / "run"
    loop = importlib.import_module("inception.training.loop")
    plain, calls = loop.evaluate, []

    def evaluate(*args: Any, check: Any, **more: Any) -> Any:
        calls.append(check)
        if len(calls) == 5:  # after four epochs, the second of the last
            check.__self__.stopping = signal.SIGINT
        return plain(*args, check=check, **more)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Stopped):
        run(options(out))
    assert len(calls) == 5
    go_on(out)
    assert_same(out, outcome(whole))


def test_a_finished_run_can_be_asked_for_its_weights_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "weights.npz").unlink()
    go_on(tmp_path / "run", weights=tmp_path / "again.npz")
    assert not (tmp_path / "run" / "weights.npz").exists()
    shutil.move(tmp_path / "again.npz", tmp_path / "run" / "weights.npz")
    assert load_weights(tmp_path / "run" / "weights.npz")[1]["weights"].startswith("average")
    found, reference = outcome(tmp_path / "run"), outcome(whole)
    assert [name for name in reference if found[name] != reference[name]] == []


# ---- What is kept ----


def test_the_last_ones_and_the_best_are_kept(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    last = [f"checkpoint-{n:08d}.npz" for n in (4 * STEPS - 2, 4 * STEPS)]
    assert names == ["best.npz", *last, "log.csv", "log.jsonl", "weights.npz"]
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["test_accuracy"])  # the first of them
    assert open_checkpoint(whole / BEST).state["step"] == best["step"]


def test_the_best_is_judged_and_used_by_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    for name, test_average in (("raw", False), ("average", True)):
        run(options(tmp_path / name, test_average=test_average))
        best = read_arrays(tmp_path / name / BEST)
        count = json.loads(str(best[CHECKPOINT]))["average_count"]
        weights, about = load_weights(tmp_path / name / BEST)
        assert about["weights"].startswith("average" if test_average else "as trained")
        for key, value in weights.items():
            wanted = best[f"average/{key}"] * (1.0 / count) if test_average else best[key]
            np.testing.assert_array_equal(value, wanted)
    rows = [json.loads(line) for line in (tmp_path / "average" / "log.jsonl").read_text().splitlines()]
    best_row = max(rows, key=lambda row: row["ema_test_accuracy"])
    assert open_checkpoint(tmp_path / "average" / BEST).state["step"] == best_row["step"]


def test_a_checkpoint_says_the_same_as_the_weights_at_the_end(whole: Path) -> None:
    weights, about = load_weights(whole / "weights.npz")
    last, about_last = load_weights(find_checkpoints(whole)[0])
    assert weights.keys() == last.keys()
    assert all(np.array_equal(weights[name], last[name]) for name in weights)
    assert about_last["classes"] == about["classes"]


def test_a_directory_that_holds_a_run_is_not_overwritten(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(CheckpointError, match=f"{whole} holds a run already: .*--resume"):
        run(options(whole))
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_two_processes_do_not_train_in_one_directory(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    descriptor = checkpoint_module._lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process is training there"):
        go_on(tmp_path / "run")
    os.close(descriptor)
    go_on(tmp_path / "run")


def test_without_a_directory_nothing_but_the_weights_is_written(tmp_path: Path) -> None:
    run(Run(recipe=Recipe(epochs=1, batch_size=8), weights=tmp_path / "w.npz", quiet=True))
    assert os.listdir(tmp_path) == ["w.npz"]


# ---- Contradictions ----


def test_options_that_contradict_the_checkpoint_are_all_named(whole: Path) -> None:
    checkpoint = open_checkpoint(whole)
    given = {"epochs": 5, "lr": 0.1, "model": "googlenet", "aux_logits": False, "save_every": 9, "out": Path("other")}
    with pytest.raises(CheckpointError) as caught:
        resumed(checkpoint, given)
    message = str(caught.value)
    for words in ("--epochs 5 (it has 4)", "--model googlenet (it has", "--aux False (it has True)", "--out other"):
        assert words in message
    assert "--lr" not in message  # the same
    assert "save" not in message  # free


def test_options_that_change_no_result_may_be_given_anew(whole: Path) -> None:
    given = {"save_every": 9, "keep": 7, "quiet": False, "weights": Path("w"), "data": "elsewhere", "out": whole}
    own = resumed(open_checkpoint(whole), given)
    assert (own.save_every, own.keep, own.quiet, own.weights) == (9, 7, False, Path("w"))
    assert (own.data, own.out, own.recipe) == ("elsewhere", whole, RECIPE)


def test_other_pictures_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_run.make_data("")
    darker = dataclasses.replace(first, images=first.images // 2)
    monkeypatch.setattr(run_module, "open_data", lambda *_, **__: (darker, second))
    with pytest.raises(CheckpointError, match="trained on other pictures"):
        go_on(whole)


def test_the_command_of_a_run_repeats_it(whole: Path, tmp_path: Path) -> None:
    command = load_weights(whole / "weights.npz")[1]["command"]
    words = command.split()
    assert words[:4] == ["python", "-m", "inception", "train"]
    assert main([*words[3:], "--out", str(tmp_path / "run"), "--quiet", "--no-report", "--save-every", "2"]) == 0
    assert_same(tmp_path / "run", outcome(whole))


# ---- Killed ----


def start(*arguments: Any, **environment: Any) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MINIGRAD_NUM_THREADS": "1", "MINIGRAD_BACKEND": "numpy"}
    command = [sys.executable, "-u", "-W", "error", str(ROOT / "tests" / "tiny_run.py"), *map(str, arguments)]
    variables |= {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(child: subprocess.Popen[str], words: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}: {child.communicate()[1]}")


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 23))])
def test_killed_at_random_moments(whole: Path, tmp_path: Path, seed: int) -> None:
    """Twice, anywhere: in a step, between epochs, in the middle of saving, which is made slow so that it is hit."""
    chance, out = random.Random(seed), tmp_path / "run"
    kills = 0
    while True:
        if out.exists() and not find_checkpoints(out):  # killed before the first one: there is nothing to go on from
            shutil.rmtree(out)
        arguments = ["--resume", out] if out.exists() else ["--out", out, *OPTIONS]
        child = start("train", *arguments, SLOW_SAVE=0.004, SLOW_STEP=0.004)
        wait_for(child, "the same again")
        if kills < 2:
            time.sleep(chance.uniform(0, 0.6))
            kills += 1
            child.kill()
            if child.wait() == -signal.SIGKILL:
                child.communicate()
                continue
        _, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        break
    assert_same(out, outcome(whole))
    assert [path.name for path in out.iterdir() if path.name.startswith(".checkpoint")] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_saves_and_says_how_to_go_on(whole: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    child = start("train", "--out", out, *OPTIONS, SLOW_STEP=0.05)
    wait_for(child, "epoch 1")
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert "finishing the step and saving" in err
    command = last.partition("go on with python -m inception ")[2].split()
    assert command == ["train", "--resume", str(out)]
    assert main([*command, "--quiet"]) == 0
    assert_same(out, outcome(whole))


def test_the_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    child = start("train", "--out", tmp_path / "run", *OPTIONS, SLOW_STEP=20)
    wait_for(child, "the same again")
    time.sleep(0.2)
    started = time.perf_counter()
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert time.perf_counter() - started < 10
    assert child.returncode == 130
    assert err.splitlines()[-1] == "stopped at once; nothing was saved"


# ---- Losses that are not finite, and other alarms ----


def plant(monkeypatch: pytest.MonkeyPatch, before: int, value: float = math.nan) -> None:
    """Break a weight before this step."""
    plain = loop_module.training_step

    def step(model: Any, batch: Any, recipe: Any) -> Any:
        if Training.latest.step == before - 1:  # type: ignore[attr-defined]
            model.fc.bias.data[3] = value
        return plain(model, batch, recipe)

    def started(self: Training, *args: Any, **options: Any) -> None:
        Training.latest = self  # type: ignore[attr-defined]
        init(self, *args, **options)

    init = Training.__init__
    monkeypatch.setattr(Training, "latest", None, raising=False)
    monkeypatch.setattr(Training, "__init__", started)
    monkeypatch.setattr(loop_module, "training_step", step)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_layer_where_it_begins(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, last = tmp_path / "run", 2 * STEPS + 2
    plant(monkeypatch, last + 1)
    with pytest.raises(NonFiniteError) as caught:
        run(options(out))
    said = str(caught.value)
    assert said.startswith("fc: linear (forward): its output (8, 10) (8 NaN among 80 values")
    assert "fc.bias (10,) (1 NaN among 10 values" in said
    assert f"loss is nan in step {last + 1}" in said
    assert f"{find_checkpoints(out)[0]} is from before" in said
    assert "\n" not in said
    assert [row["epoch"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())] == [1, 2]
    assert not (out / "weights.npz").exists()
    checkpoint = open_checkpoint(out)
    assert checkpoint.state["step"] == last
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "create_model", tiny_run.make_model)
    monkeypatch.setattr(run_module, "open_data", tiny_run.make_data)
    go_on(out)  # without what broke it, it is the same run
    assert_same(out, outcome(whole))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("before", [STEPS + 1, STEPS + 2, 2 * STEPS])
def test_where_losses_are_not_looked_at_in_every_step_nothing_broken_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, value: float
) -> None:
    """As on a GPU: seen when they are fetched, at the latest before anything is written."""
    monkeypatch.setattr(Training, "_check_step", lambda *_: None)
    plant(monkeypatch, before, value)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=r"is (nan|inf), seen at step .* on a GPU"):
        run(options(tmp_path / "run", quiet=True))
    saved = find_checkpoints(tmp_path / "run")
    assert all(int(path.stem[-8:]) < before for path in saved)
    assert all(np.isfinite(x).all() for path in saved for x in open_checkpoint(path).arrays.values())


def test_weights_that_break_without_the_loss_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Training._update

    def update(self: Training) -> None:
        plain(self)
        if self.step == STEPS + 1:
            self.model.conv.weight.data[0, 0, 0, 0] = math.nan

    monkeypatch.setattr(Training, "_update", update)
    with pytest.raises(NonFiniteError, match=rf"conv.weight is not finite after step {STEPS + 2}, though the loss"):
        run(options(tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").state["step"] == STEPS


@pytest.mark.parametrize("how", ["", "json", "quiet"])
def test_a_dead_layer_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    def make_model(*args: Any, **given: Any) -> Any:
        model = tiny_run.make_model(*args, **given)
        model.norm.beta.data[...] = -1e3
        return model

    monkeypatch.setattr(run_module, "create_model", make_model)
    run(options(tmp_path / "run", quiet=how == "quiet", json=how == "json"))
    out, err = capfd.readouterr()
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (how != "quiet")
    assert all("norm gives zero for all 8 pictures of a batch" in line for line in warnings)
    if how == "json":
        assert all(json.loads(line) for line in out.splitlines())


def test_looking_for_dead_layers_changes_no_bit(whole: Path, tmp_path: Path) -> None:
    """`whole` was trained quietly, and nothing was looked at."""
    run(options(tmp_path / "run", quiet=False))
    assert_same(tmp_path / "run", outcome(whole))


# ---- A disk that fails ----


def test_a_full_disk_while_saving(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The previous checkpoint survives, training goes on, and what comes later is saved when there is space again."""
    out, plain, calls = tmp_path / "run", np.savez, []

    def savez(file: Any, **arrays: Any) -> None:
        calls.append(sorted(path.name for path in out.glob("checkpoint-*.npz")))
        if len(calls) in (3, 4):
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    run(options(out))
    assert calls[3] == calls[4] == ["checkpoint-00000002.npz", "checkpoint-00000004.npz"]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all("could not be written (No space left on device); the last one" in line for line in warnings)
    assert "checkpoint-00000004.npz, is whole; training goes on" in warnings[0]
    assert open_checkpoint(out / BEST).state["step"] == 2 * STEPS  # that of the first epoch was lost: the next is kept
    shutil.copy(whole / BEST, out / BEST)
    assert_same(out, outcome(whole))


def test_a_disk_that_takes_no_file_of_that_size(tmp_path: Path) -> None:
    """Really, by the limit of the operating system: each failure is told, and the last one ends the program."""
    child = start("train", "--out", tmp_path / "run", *OPTIONS, "--epochs", 1, LARGEST_FILE=3000)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "epoch 1: " in out
    lines = err.splitlines()
    assert "Traceback" not in err
    assert sum("warning: " in line and "could not be written (File too large)" in line for line in lines) >= 3
    assert lines[-1].startswith(f"error: {tmp_path / 'run' / 'weights.npz'} could not be written (File too large)")
    assert sorted(os.listdir(tmp_path / "run")) == ["log.csv", "log.jsonl"]


def test_a_stop_that_cannot_be_saved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any
) -> None:
    def savez(file: Any, **arrays: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    stop_after(1)
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(WeightsError, match=r"checkpoint-00000001\.npz could not be written \(Read-only file system\)"):
        run(options(tmp_path / "run"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_that_cannot_be_written_is_refused_before_training(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """By the error that a read-only one gives, since whoever runs the tests may be allowed everything."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    plain = Path.touch

    def touch(self: Path, *args: Any) -> None:
        if self.parent in (out, tmp_path / "new"):
            raise PermissionError(errno.EACCES, "Permission denied")
        plain(self, *args)

    monkeypatch.setattr(Path, "touch", touch)
    monkeypatch.setattr(Training, "run", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(WeightsError, match=r"cannot be written \(Permission denied\)"):
        go_on(out, weights=tmp_path / "w.npz") if resume else run(options(tmp_path / "new"))


def test_a_log_that_is_removed_comes_back(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, plain = tmp_path / "run", Training._report

    def report(self: Training) -> Any:
        if len(self.epochs) == 2:
            (out / "log.jsonl").unlink()
        return plain(self)

    monkeypatch.setattr(Training, "_report", report)
    run(options(out))
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning == f"warning: {out / 'log.jsonl'} was gone and has been written anew, with all its 3 rows"
    assert_same(out, outcome(whole))


# ---- Damaged files ----


def refused(where: Path) -> str:
    """Going on must fail with one sentence that names a file."""
    with pytest.raises(MinigradError) as caught:
        go_on(where)
    message = str(caught.value)
    assert "\n" not in message
    assert str(where) in message
    return message


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def rewrite(path: Path, change: Any = None, **arrays: Any) -> None:
    """The file again, its JSON changed in place by `change`, arrays replaced, added or (None) left out."""
    found: dict[str, Any] = read_arrays(path)
    if change is not None:
        state = json.loads(str(found[CHECKPOINT]))
        change(state)
        found[CHECKPOINT] = np.array(json.dumps(state))
    found = {name: value for name, value in (found | arrays).items() if value is not None}
    np.savez(path, allow_pickle=True, **found)


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "text", "no zip end"])
def test_a_damaged_checkpoint_names_the_next_older_one_that_is_whole(copy: Path, damage: str) -> None:
    newest, older = find_checkpoints(copy)
    content = newest.read_bytes()
    changed = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "flipped": content[:400] + bytes([content[400] ^ 1]) + content[401:],
        "text": b"hello",
        "no zip end": content[:-10],
    }
    newest.write_bytes(changed[damage])
    message = refused(copy)
    assert str(newest) in message
    assert f"the next older one, {older}, is whole: --resume {older}" in message
    go_on(older)
    older.write_bytes(b"")
    newest.write_bytes(b"")
    assert "is whole" not in refused(copy)


def test_every_single_bit(copy: Path) -> None:
    """Somewhere in each stretch of the file: never a wrong array, always a sentence or what was written."""
    path = find_checkpoints(copy)[0]
    content, wanted, sentences = bytearray(path.read_bytes()), read_arrays(path), []
    for place in range(0, len(content), 97):
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        content[place] ^= 1 << place % 8
        try:
            found = open_checkpoint(path)
        except MinigradError as error:
            sentences.append(str(error))
            continue
        assert all(found.arrays[name].tobytes() == wanted[name].tobytes() for name in found.arrays)
    assert len(sentences) > 100
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)


def test_of_a_newer_version(copy: Path) -> None:
    path = find_checkpoints(copy)[0]
    rewrite(path, lambda state: state.update(format=2))
    assert "written in format 2, this version reads format 1: update it" in refused(path)


def test_of_another_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_checkpoints(copy)[0]
    monkeypatch.setattr(
        run_module, "create_model", lambda name, **o: tiny_run.make_model(name, **o | {"num_classes": 9})
    )
    assert "fc.weight has (10, 6), the model wants (9, 6)" in refused(path)


def test_weights_are_no_checkpoint(copy: Path) -> None:
    assert "no checkpoint (weights without a training to go on with)" in refused(copy / "weights.npz")


def test_a_place_without_checkpoints(tmp_path: Path) -> None:
    assert "no checkpoint in this directory" in refused(tmp_path)
    assert "there is no such file" in refused(tmp_path / "missing")


@pytest.mark.parametrize(
    "arrays",
    [
        {"conv.weight": None},
        {"conv.weight": np.zeros((6, 3, 3, 3), complex)},
        {"conv.weight": np.full((6, 3, 3, 3), "x")},
        {"extra": np.zeros(3, np.float32)},
        {"other/part": np.zeros(3, np.float32)},
        {"optimizer/velocity.0": None},
        {"optimizer/updates": np.zeros(3)},
        {"average/fc.bias": np.zeros(11, np.float32)},
        {"average/fc.bias": None},
        {"average/fc.bias": np.full(10, "x")},
        {"sums/loss": np.zeros(2)},
        {"sums/hits": None, "sums/loss": np.float32(1), "sums/aux1": np.float32(1)},
        {"sums/hits": np.array("many"), "sums/loss": np.float32(1)},
    ],
    ids=lambda arrays: "-".join(arrays),
)
def test_arrays_that_do_not_fit(copy: Path, arrays: dict[str, Any]) -> None:
    path = find_checkpoints(copy)[0]
    rewrite(path, **arrays)
    assert "cannot be continued" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("step"),
        lambda s: s.update(step=7),
        lambda s: s.update(step="many"),
        lambda s: s.update(epochs=s["epochs"][:2]),
        lambda s: s.update(epochs=s["epochs"] * 2, step=8 * STEPS),
        lambda s: s.update(epochs=3),
        lambda s: s["epochs"][0].pop("losses"),
        lambda s: s["epochs"][0].update(test="good"),
        lambda s: s["epochs"][0].update(test=[1.0]),
        lambda s: s["sums"].update(steps=3),
        lambda s: s["sums"].update(steps=float("inf")),
        lambda s: s["recipe"].pop("lr"),
        lambda s: s["recipe"].update(colour="red"),
        lambda s: s["recipe"].update(lr="high"),
        lambda s: s["recipe"].update(name="unheard of"),
        lambda s: s["recipe"].update(step_at=["one"]),
        lambda s: s.update(recipe=None),
        lambda s: s.update(run=None),
        lambda s: s["run"].update(options=[]),
        lambda s: s["run"]["options"].update(keep="all"),
        lambda s: s["run"]["options"].update(keep=0),
        lambda s: s["run"]["options"].update(weights=5),
        lambda s: s["run"].pop("data"),
        lambda s: s.update(average_count=None),
    ],
)
def test_a_description_that_does_not_fit(copy: Path, change: Any) -> None:
    path = find_checkpoints(copy)[0]
    rewrite(path, change)
    refused(path)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


def test_nothing_in_a_checkpoint_is_executed(copy: Path) -> None:
    path, sentinel = find_checkpoints(copy)[0], copy / "executed"
    content = path.read_bytes()
    for name in ("conv.weight", CHECKPOINT, "optimizer/updates", "new"):
        path.write_bytes(content)
        rewrite(path, **{name: np.array([Touch(sentinel)], dtype=object)})
        refused(path)
    path.write_bytes(pickle.dumps(Touch(sentinel)))
    refused(path)
    assert not sentinel.exists()


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with something done to them that a disk, a network or a stranger might do."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(changed))
        kind = chance.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + chance.randrange(1, 64)] = bytes(chance.randrange(256) for _ in range(8))
        elif kind == 2:
            del changed[at : at + chance.randrange(1, 2000)]
        elif kind == 3:
            changed[at:at] = changed[at // 2 : at // 2 + chance.randrange(1, 500)]
        else:
            changed[at : at + 4] = chance.choice([b"\x00" * 4, b"\xff" * 4, b"PK\x01\x02", b"PK\x05\x06"])
        if not changed:
            return b""
    return bytes(changed)


def strange(value: Any, chance: random.Random) -> Any:
    """A JSON value with something in it replaced, lost or doubled."""
    odd = [None, True, -1, 10**400, 1e308, float("nan"), float("-inf"), "", "x" * 99, [], [[]], {}, {"a": 1}]
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: strange(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], strange(value[at], chance), *value[at + 1 :]]
    return chance.choice(odd)


@pytest.mark.parametrize("rounds", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_whatever_is_in_a_file_only_sentences_come_out(copy: Path, rounds: int) -> None:
    """Damage to bytes, and to values within a sound archive; what passes must be good enough to be put in place."""
    newest = find_checkpoints(copy)[0]
    path = copy / "checkpoint-00000099.npz"
    content, arrays = newest.read_bytes(), read_arrays(newest)
    state = json.loads(str(arrays[CHECKPOINT]))
    first, _ = tiny_run.make_data("")
    mean, std = mean_and_std(first)
    chance, passed, sentences = random.Random(0), 0, []
    for number in range(rounds):
        if number % 2:
            path.write_bytes(damaged(content, chance))
        else:
            odd = strange(state, chance)
            np.savez(path, **arrays | {CHECKPOINT: np.array(json.dumps(odd))})
        try:
            checkpoint = open_checkpoint(path)
            own = resumed(checkpoint, {})
            loader = Loader(first, own.recipe.batch_size, mean=mean, std=std, drop_last=True)
            training = Training(tiny_run.make_model("", num_classes=10, aux_logits=True), loader, own.recipe)
            restore(checkpoint, training)
            passed += 1
        except MinigradError as error:
            sentences.append(str(error))
        except Exception as error:
            (copy / "found").write_bytes(path.read_bytes())
            raise AssertionError(f"round {number}: {type(error).__name__}: {error}, from {copy / 'found'}") from error
    assert passed < 0.6 * rounds
    assert not any("\n" in sentence for sentence in sentences)


def test_a_zip_with_a_lying_header(copy: Path) -> None:
    """An array that says it is larger than the file is not allocated and filled with what happens to be there."""
    path = find_checkpoints(copy)[0]
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["fc.bias.npy"] = parts["fc.bias.npy"].replace(b"(10,)", b"(10000000000,)", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    assert "not a readable .npz file" in refused(path)
