"""Runs that are killed, signalled, diverge, or meet a disk that fails: nothing that was saved is lost."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from tiny_run import OPTIONS, STEPS, assert_same, go_on, options, outcome, start, wait_for

from inception.__main__ import main
from inception.files import FileError
from inception.training import Training, open_checkpoint, run
from inception.training.checkpoint import BEST, find_checkpoints
from minigrad.errors import NonFiniteError

run_module = importlib.import_module("inception.training.run")
step_module = importlib.import_module("inception.training.step")


# ---- Killed ----


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 25))])
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
    plain = step_module.training_step

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
    monkeypatch.setattr(step_module, "training_step", step)


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


# ---- A reader who has gone ----


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["sentences", "json"])
def test_nobody_reads_on(whole: Path, tmp_path: Path, form: list[str]) -> None:
    """As `| head -1` does it: the lines are lost, not the training."""
    child = start("train", "--out", tmp_path / "run", *OPTIONS, *form)
    assert child.stdout is not None
    assert child.stderr is not None
    with child.stdout:
        child.stdout.readline()
    with child.stderr:
        said = child.stderr.read()
    assert (child.wait(), "Traceback" in said) == (0, False)
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
    assert lines[-2].startswith(f"error: {tmp_path / 'run' / 'weights.npz'} could not be written (File too large)")
    assert lines[-1] == "the training has ended; nothing was saved"
    assert sorted(os.listdir(tmp_path / "run")) == ["log.csv", "log.jsonl"]


def test_a_stop_that_cannot_be_saved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any
) -> None:
    def savez(file: Any, **arrays: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    stop_after(1)
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(FileError, match=r"checkpoint-00000001\.npz could not be written \(Read-only file system\)"):
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
    with pytest.raises(FileError, match=r"cannot be written \(Permission denied\)"):
        go_on(out, save=tmp_path / "w.npz") if resume else run(options(tmp_path / "new"))


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
