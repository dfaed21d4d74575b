"""What the directory of a run holds, and what a run must not overwrite; options that are out of range."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from tiny_run import OPTIONS, STEPS, assert_same, go_on, options, outcome

from inception.__main__ import main
from inception.files import FileError
from inception.training import Run, Stopped, Training, open_checkpoint, resumed, run
from inception.training.checkpoint import BEST, CheckpointError, find_checkpoints, save_checkpoint
from inception.weights import CHECKPOINT, read_arrays
from minigrad.errors import MinigradError

run_module = importlib.import_module("inception.training.run")
step_module = importlib.import_module("inception.training.step")
directory_module = importlib.import_module("inception.training.directory")


# ---- What a directory holds ----


def test_the_best_checkpoint_serves_where_there_is_no_other(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, update = tmp_path / "run", save_checkpoint, Training._update

    def save(path: Path, *rest: Any) -> None:
        if path.name != BEST:
            raise FileError(f"{path} could not be written")
        plain(path, *rest)

    def stop(self: Training) -> None:
        update(self)
        if self.step == STEPS:
            self.stopping = signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(directory_module, "save_checkpoint", save)
        patch.setattr(Training, "_update", stop)
        with pytest.raises(FileError) as caught:
            run(options(out))
    (note,) = caught.value.__notes__
    words = f"saved in best.npz up to step {STEPS}: go on with python -m inception train --resume {out / BEST}"
    assert note.endswith(words)
    go_on(out)
    assert_same(out, outcome(whole))


def test_a_directory_with_a_log_alone_is_no_dead_end(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole / "log.jsonl", out)
    with pytest.raises(CheckpointError, match=f"no checkpoint to go on from: name .* or remove {out}/log.jsonl"):
        run(options(out))
    with pytest.raises(CheckpointError, match=r"nothing to go on from: train anew, in another directory \(--out\)"):
        go_on(out)
    (out / "log.jsonl").unlink()
    run(options(out))
    assert_same(out, outcome(whole))


def test_a_checkpoint_hardly_grows(whole: Path, tmp_path: Path) -> None:
    """By its log, a quarter of a kilobyte an epoch: bytes, not four bytes a letter."""
    path = find_checkpoints(whole)[0]
    checkpoint = read_arrays(path)[CHECKPOINT]
    assert checkpoint.dtype.kind == "S"
    epochs = json.loads(checkpoint.item())["epochs"]
    assert checkpoint.nbytes == len(checkpoint.item())
    assert len(json.dumps(epochs)) / len(epochs) < 500


# ---- What is not overwritten ----


def test_a_checkpoint_does_not_choose_what_is_overwritten(whole: Path, tmp_path: Path, stop_after: Any) -> None:
    """Nor does one of an older version, which has said where the weights go."""
    out, victim = tmp_path / "run", tmp_path / "victim.txt"
    victim.write_text("mine")
    stop_after(STEPS + 1)
    with pytest.raises(Stopped):
        run(options(out))
    stop_after(-1)
    path = find_checkpoints(out)[0]
    arrays = read_arrays(path)
    state = json.loads(arrays[CHECKPOINT].item())
    state["run"]["options"] |= {"weights": str(victim), "save": str(victim), "out": str(tmp_path), "quiet": True}
    state["run"]["data"] = {k: v for k, v in state["run"]["data"].items() if not k.startswith("test ")}
    arrays[CHECKPOINT] = np.array(json.dumps(state))  # text, as older versions wrote it
    np.savez(path, **arrays)
    go_on(out)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["run", "victim.txt"]
    found, wanted = (read_arrays(place / "weights.npz") for place in (out, whole))
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_what_exists_is_not_overwritten(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "run", lambda *_, **__: pytest.fail("it trained"))
    mine = tmp_path / "mine.npz"
    mine.write_text("mine")
    with pytest.raises(FileError, match=r"mine\.npz exists already, .* name another file \(--save\)"):
        run(options(tmp_path / "run", save=mine))
    with pytest.raises(FileError, match=r"mine\.npz exists already"):
        go_on(whole, save=mine)
    (tmp_path / "run").mkdir()
    shutil.copy(mine, tmp_path / "run" / "weights.npz")
    with pytest.raises(FileError, match=r"weights\.npz exists already, .* name another directory \(--out\)"):
        run(options(tmp_path / "run"))
    for place in (Run(save=Path("googlenet_small")), Run(out=Path("googlenet_small"))):
        with pytest.raises(FileError, match=r"googlenet_small: a model of this name comes with the package"):
            run(place)
    assert mine.read_text() == "mine"


def test_other_test_pictures_are_refused(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_run.make_data("")
    fewer = dataclasses.replace(second, images=second.images[:-1], labels=second.labels[:-1])
    darker = dataclasses.replace(second, images=second.images // 2)
    for other, what in ((fewer, "test number, test labels, test pixels"), (darker, "test pixels")):
        monkeypatch.setattr(run_module, "open_data", lambda *_, other=other, **__: (first, other))
        with pytest.raises(CheckpointError, match=f"evaluated on other pictures .*: not the same {what}$"):
            go_on(whole)


# ---- Options ----


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--weights w.npz", "--save w.npz names the file to write, --resume a checkpoint"),
        ("--out=", "an empty name"),
        ("--save=", "an empty name"),
        ("--out=~nobody-of-this-name/x", "no such home directory"),
        ("--epochs=-1", "epochs must be at least 1"),
        ("--epochs=1e3", "invalid int value"),
        ("--save-every=0", "save_every must be at least 1"),
        ("--keep=-1", "keep must be at least 1"),
        ("--prefetch=-1", "prefetch must be from 0"),
        ("--prefetch=1000000000", "prefetch must be from 0"),
        ("--size=0", "size must be from 1"),
        ("--size=1000000", "size must be from 1"),
        ("--width=nan", "width must be from 0"),
        ("--width=-1", "width must be from 0"),
        ("--width=100", "width must be from 0"),
        ("--validation=-0.5", "validation must be from 0"),
        ("--validation=inf", "validation must be"),
        ("--threads=0", "number of threads"),
    ],
)
def test_options_out_of_range(tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str, says: str) -> None:
    try:
        code: Any = main(["train", "--out", str(tmp_path / "run"), *OPTIONS, *option.split(" ")])
    except SystemExit as stop:
        code = stop.code
    *_, last = capfd.readouterr().err.splitlines()
    assert code in (1, 2)
    assert "error: " in last
    assert says in last
    assert not (tmp_path / "run").exists()


def test_home_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an equals sign, where shells leave ~ as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--out=~/zz", "--save=~/w.npz", *OPTIONS, "--quiet"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["w.npz", "zz"]
    assert main(["train", "--resume=~/zz", "--quiet"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["w.npz", "zz"]


def test_what_a_run_stores_names_no_place(whole: Path) -> None:
    stored = open_checkpoint(whole).state["run"]["options"]
    assert not {"out", "save", "weights"} & stored.keys()
    assert resumed(open_checkpoint(whole), {}).weights_file == whole / "weights.npz"
    with pytest.raises(MinigradError, match="width must be from 0 to 16"):
        Run(width=100.0)
