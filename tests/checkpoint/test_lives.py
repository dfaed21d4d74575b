"""What must not end a training, and what must be saved when it ends all the same.

The expected result is always that of the run that nothing disturbed, to the last bit.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import OPTIONS, RECIPE, ROOT, STEPS, assert_same, go_on, options, outcome, start, wait_for

from inception import console
from inception.__main__ import main
from inception.data import DataError, Loader, mean_and_std
from inception.files import FileError
from inception.training import Training, open_checkpoint, run, train
from inception.training.checkpoint import find_checkpoints
from inception.training.directory import write_somewhere
from inception.weights import read_arrays

run_module = importlib.import_module("inception.training.run")
step_module = importlib.import_module("inception.training.step")
directory_module = importlib.import_module("inception.training.directory")


def end(child: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What it printed. It must have ended with this code, and without a traceback."""
    out, err = child.communicate(timeout=120)
    assert child.returncode == code, err
    assert "Traceback" not in err
    return out, err


# ---- Streams ----


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "2>&1 | head -2"]
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["sentences", "json"])
def test_no_stream_ends_a_training(whole: Path, tmp_path: Path, redirection: str, form: list[str]) -> None:
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    shell = ("bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash")
    _, err = end(start("train", "--out", tmp_path / "run", *OPTIONS, *form, how=shell))
    assert_same(tmp_path / "run", outcome(whole))
    said = [line for line in err.splitlines() if line.startswith("warning: standard output could not be written ")]
    assert len(said) == (redirection in (">&-", ">/dev/full"))


def test_streams_that_can_do_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with `write` alone, as a tee in a program, and one that raises whatever it likes."""

    class Tee:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text

    class Broken:
        def write(self, text: str) -> None:
            raise RuntimeError(text)

    first, _ = tiny_run.make_data("")
    mean, std = mean_and_std(first)
    losses = []
    for stream in (Tee(), Broken(), None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        console.say("a line")
        model = tiny_run.make_model("", num_classes=10, aux_logits=True)
        (epoch,) = train(model, Loader(first, 8, mean=mean, std=std), dataclasses.replace(RECIPE, epochs=1))
        losses.append(epoch.losses)
        assert not isinstance(stream, Tee) or "a line\n" in stream.text
    assert losses[1:] == losses[:-1]


def test_a_result_that_cannot_be_printed_is_a_failure(tmp_path: Path) -> None:
    """Of a command whose result is what it prints; a training's result is a file."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "inception", "summary", "googlenet_small"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")


# ---- Exceptions ----


ERRORS = [DataError("p.png: not a readable picture"), MemoryError("no room"), OSError(5, "I/O"), ZeroDivisionError()]


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: BaseException) -> None:
    """Have the function raise at the end of this call, counted from 1, when it has done its work."""
    plain, calls = getattr(owner, name), []

    @functools.wraps(plain)
    def failing(*args: Any, **more: Any) -> Any:
        result = plain(*args, **more)
        calls.append(0)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [
        (step_module, "training_step", 2 * STEPS + 4, 2 * STEPS + 3),  # buffers have moved, and are put back
        (Loader, "_batch", STEPS + 5, STEPS + 2),  # prefetched by two
        (Training, "_report", 2, 2 * STEPS),
        (directory_module.RunDirectory, "after_epoch", 3, 3 * STEPS),
    ],
    ids=["forward", "picture", "evaluation", "hook"],
)
def test_whatever_ends_a_run_leaves_it_saved(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, owner: Any, name: str, call: int,
    saved: int,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_once(patch, owner, name, call, error)
        with pytest.raises(type(error)) as caught:
            run(options(out, save_every=999))
    (note,) = caught.value.__notes__
    del error.__notes__  # the same object serves the next test
    if owner is not Loader:
        assert open_checkpoint(out).state["step"] == saved
    words = f"the training has ended; saved up to step {open_checkpoint(out).state['step']}: go on with python -m "
    assert note == f"{words}inception train --resume {out}"
    assert open_checkpoint(out).state["step"] >= saved
    go_on(out, save_every=2)
    assert_same(out, outcome(whole))


def test_an_update_that_fails_midway_is_not_saved(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the weights have moved: the last checkpoint is what there is."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_once(patch, Training, "_update", STEPS + 4, MemoryError("no room"))
        with pytest.raises(MemoryError) as caught:
            run(options(out, save_every=STEPS + 2))
    assert f"saved up to step {STEPS + 2}: go on" in caught.value.__notes__[0]
    go_on(out, save_every=2)
    assert_same(out, outcome(whole))


def test_the_command_says_how_to_go_on_in_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, step_module, "training_step", 4, MemoryError("no room"))
    arguments = ["train", "--out", str(tmp_path / "a b"), "--save", str(tmp_path / "w.npz"), *OPTIONS, "--quiet"]
    assert main(arguments) == 1
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("error: out of memory (no room; ")
    assert last.endswith(f"train --resume '{tmp_path / 'a b'}' --save {tmp_path / 'w.npz'}")


def test_a_damaged_test_picture_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.undo()  # the real data
    for part, count in (("train", 8), ("test", 6)):
        for name, colour in (("a", "red"), ("b", "blue")):
            (tmp_path / "f" / part / name).mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (20, 20), colour).save(tmp_path / "f" / part / name / f"p{number}.png")
    bad = tmp_path / "f" / "test" / "b" / "p5.png"
    os.truncate(bad, 60)
    monkeypatch.setattr(Training, "run", lambda *_, **__: pytest.fail("it trained"))
    arguments = ["--data", tmp_path / "f", "--size", 32, "--batch-size", 4, "--out", tmp_path / "run", "--quiet"]
    assert main(["train", *map(str, arguments)]) == 1
    assert f"{bad}: not a readable picture" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- The system ----


@pytest.fixture(scope="session")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload, in which system calls fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("preload") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks(whole: Path, tmp_path: Path, failing_calls: Path, number: int) -> None:
    child = start("train", "--out", tmp_path / "run", *OPTIONS, LD_PRELOAD=failing_calls, FAIL_FLOCK=number)
    _, err = end(child)
    assert sum(f"run cannot be locked ({os.strerror(number)})" in line for line in err.splitlines()) == 1
    assert_same(tmp_path / "run", outcome(whole))


def test_a_lock_that_is_held_is_another_process(tmp_path: Path, failing_calls: Path) -> None:
    arguments = ["train", "--out", tmp_path / "run", *OPTIONS]
    _, err = end(start(*arguments, LD_PRELOAD=failing_calls, FAIL_FLOCK=errno.EWOULDBLOCK), code=1)
    assert "another process is training there" in err


def test_directories_that_cannot_be_synced(whole: Path, tmp_path: Path, failing_calls: Path) -> None:
    arguments = ["train", "--out", tmp_path / "run", *OPTIONS]
    _, err = end(start(*arguments, LD_PRELOAD=failing_calls, FAIL_DIRECTORY_FSYNC=errno.EINVAL))
    assert "warning" not in err
    assert len(find_checkpoints(tmp_path / "run")) == 2  # older ones are deleted
    assert_same(tmp_path / "run", outcome(whole))


def test_old_checkpoints_that_cannot_be_deleted(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As after `chattr +i`, which not every file system has."""

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("checkpoint-00000002"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        plain(self, missing_ok)

    plain = Path.unlink
    monkeypatch.setattr(Path, "unlink", unlink)
    run(options(tmp_path / "run"))
    (warning,) = capfd.readouterr().err.splitlines()
    assert "checkpoint-00000002.npz is not needed any more and cannot be deleted (Operation not permitted)" in warning
    assert [int(path.stem[-8:]) for path in find_checkpoints(tmp_path / "run")] == [4 * STEPS, 4 * STEPS - 2, 2]
    assert_same(tmp_path / "run", outcome(whole))


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_directory_that_goes_away_is_made_again(whole: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    child = start("train", "--out", out, *OPTIONS, SLOW_STEP=0.03)
    wait_for(child, "epoch 2")
    shutil.move(out, tmp_path / "elsewhere")
    if how == "removed":
        shutil.rmtree(tmp_path / "elsewhere")
    _, err = end(child)
    assert f"warning: {out} was gone and has been made again" in err
    found, wanted = (read_arrays(path / "weights.npz") for path in (out, whole))
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert (out / "log.csv").read_text().count("\n") == 5
    assert open_checkpoint(out).state["step"] == 4 * STEPS


def test_finished_weights_go_elsewhere_when_the_disk_is_full(whole: Path, tmp_path: Path, failing_calls: Path) -> None:
    out, marker, here = tmp_path / "run", tmp_path / "now", tmp_path / "here"
    here.mkdir()
    how = ("env", "-C", str(here), f"LD_PRELOAD={failing_calls}", f"FULL={out}:{marker}")
    child = start("train", "--out", out, *OPTIONS, how=how, SLOW_STEP=0.03)
    wait_for(child, "epoch 2")
    marker.touch()
    said, err = end(child)
    assert f"{out / 'weights.npz'} could not be written (No space left on device)" in err
    assert f"written to {here / 'run-weights.npz'} instead" in err
    assert said.splitlines()[-1].endswith(f"weights in {here / 'run-weights.npz'}")
    found, wanted = read_arrays(here / "run-weights.npz"), read_arrays(whole / "weights.npz")
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_the_oldest_checkpoint_makes_room_for_the_weights(whole: Path, tmp_path: Path) -> None:
    """On a small file system of its own, which fills up in the third epoch."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        child = start("train", "--out", disk / "run", *OPTIONS, SLOW_STEP=0.05)
        wait_for(child, "epoch 2")
        with pytest.raises(OSError, match="No space left on device"):
            (disk / "other").write_bytes(bytes(1 << 20))
        said, err = end(child)
        assert "could not be written (No space left on device); the last one" in err
        assert "was deleted to make room for" in err
        assert said.splitlines()[-1].endswith(f"weights in {disk / 'run' / 'weights.npz'}")
        found, wanted = (read_arrays(path / "weights.npz") for path in (disk / "run", whole))
        assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
        assert len(find_checkpoints(disk / "run")) == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_place_for_finished_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which places are tried; nothing is overwritten and nothing is deleted without need."""
    monkeypatch.chdir(tmp_path)
    wanted, spare = tmp_path / "gone" / "run" / "weights.npz", [tmp_path / "old"]
    spare[0].touch()

    def write(path: Path, refused: tuple[Path, ...] = ()) -> None:
        if any(path.is_relative_to(place) for place in refused):
            raise FileError(f"{path} could not be written (Read-only file system)")
        path.write_text("weights")

    assert write_somewhere(write, wanted, spare) == wanted  # its directory is made
    taken = tmp_path / "run-weights.npz"
    taken.write_text("mine")
    read_only = functools.partial(write, refused=(tmp_path / "gone",))
    assert write_somewhere(read_only, wanted, spare) == tmp_path / "run-weights-2.npz"
    assert (taken.read_text(), spare[0].exists()) == ("mine", True)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def write_there(path: Path) -> None:
        write(path, () if path.is_relative_to(temporary) else (tmp_path,))

    assert write_somewhere(write_there, wanted, spare) == temporary / "run-weights.npz"
    with pytest.raises(FileError, match=r"gone/run/weights\.npz could not be written \(Read-only file system\)"):
        write_somewhere(functools.partial(write, refused=(tmp_path,)), wanted, spare)


# ---- Signals ----


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
def test_hang_up_saves_and_nohup_is_respected(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start("train", "--out", out, *OPTIONS, SLOW_STEP=0.05)
    wait_for(child, "epoch 1")
    child.send_signal(signal.SIGHUP)
    _, err = end(child, 128 + signal.SIGHUP)
    assert err.splitlines()[-1].endswith(f"go on with python -m inception train --resume {out}")
    ignoring = ("bash", "-c", 'trap "" HUP; exec "$@"', "bash")
    child = start("train", "--resume", out, SLOW_STEP=0.05, how=ignoring)
    wait_for(child, "going on from")
    child.send_signal(signal.SIGHUP)
    end(child)
    assert_same(out, outcome(whole))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")
def test_a_checkpoint_on_request(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start("train", "--out", out, *OPTIONS, "--save-every", 9999, SLOW_STEP=0.1)
    wait_for(child, "epoch 1")
    time.sleep(0.15)  # within the second epoch
    child.send_signal(signal.SIGUSR1)
    for _ in range(100):
        if any(int(path.stem[-8:]) % STEPS for path in find_checkpoints(out)):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("no checkpoint within an epoch")
    end(child)
    assert_same(out, outcome(whole))


def test_interrupted_twice_while_a_file_is_written(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start("train", "--out", out, *OPTIONS, "--save-every", 9999, SLOW_STEP=0.1, SLOW_SAVE=0.7)
    wait_for(child, "epoch 1")
    child.send_signal(signal.SIGINT)
    for _ in range(1000):
        if list(out.glob(".checkpoint-*")):
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = end(child, 130)
    said = [line for line in err.splitlines() if line]
    assert "stopping when the file is written" in said
    assert said[-1].startswith("stopped at once; saved up to step ")
    assert said[-1].endswith(f"go on with python -m inception train --resume {out}")
    assert not list(out.glob(".checkpoint-*"))
    go_on(out, save_every=2)
    assert_same(out, outcome(whole))


@pytest.mark.parametrize("library", ["_multiarray_umath", "openblas"])
def test_interrupted_while_it_starts(library: str) -> None:
    """When this library of NumPy's is in memory: in the middle of the imports."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    command = [sys.executable, "-m", "inception", "train", "--epochs", "1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for _ in range(10_000):
            if library in Path(f"/proc/{child.pid}/maps").read_text():
                break
            time.sleep(0.001)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err.decode().strip()) == (130, "stopped")
