"""The directory of a run: its log, its last checkpoints and its best one; and a place for the finished weights."""

from __future__ import annotations

import errno
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

from inception import console
from inception.files import FileError, check_place
from inception.training.checkpoint import (
    BEST,
    CheckpointError,
    epoch_of,
    find_checkpoints,
    place,
    read_checkpoint,
    save_checkpoint,
    step_of,
)
from inception.training.log import Log, row_of
from inception.training.loop import Epoch, Training
from inception.weights import WeightsError

_LEFT_BEHIND = re.compile(r"\..+\.(npz|jsonl|csv|png)\.\d+")  # by a process that was killed while it wrote


class RunDirectory:
    """Keeps a training safe in its directory.

    directory    None: nothing is kept
    about        what the weights are, for `save_checkpoint`
    run          what `resumed` needs, as plain JSON values
    watched      what the log calls the pictures evaluated on
    save_every   steps between two checkpoints, besides those after every epoch
    keep         how many of the last checkpoints stay
    resumed      the directory may hold a run: this one
    again        words that the command that goes on needs besides --resume
    finished     a block in which files are written: see `Signals`

    Enter it before training. A file that cannot be written or deleted is a warning: training goes on.
    Raises CheckpointError on entering if the directory holds another run, or one that is running now.
    """

    def __init__(
        self,
        training: Training,
        about: dict[str, Any],
        run: dict[str, Any],
        directory: Path | None,
        *,
        watched: str = "test",
        save_every: int = 200,
        keep: int = 2,
        tensorboard: bool = False,
        resumed: bool = False,
        again: str = "",
        finished: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.training, self.about, self.run, self.directory = training, about, run, directory
        self.watched, self.save_every, self.keep = watched, save_every, keep
        self.tensorboard, self.resumed, self.again, self.finished = tensorboard, resumed, again, finished
        self.best = -1.0  # accuracy of the best checkpoint
        self.began = training.step  # moved on entering
        self.asked = False  # for a checkpoint after this step
        self.stuck: set[Path] = set()  # old checkpoints that cannot be deleted

    def __enter__(self) -> RunDirectory:
        self.began = self.training.step
        if self.directory is None:
            return self
        if not self.resumed:
            check_free(self.directory)
        check_place(place(self.directory, 0))
        self.lock: int | None = _lock(self.directory)
        try:
            for path in self.directory.glob(".*"):
                if _LEFT_BEHIND.fullmatch(path.name):
                    with suppress(OSError):
                        path.unlink()
            self.log = Log(self.directory, console.warning, tensorboard=self.tensorboard, step=self.training.step)
        except BaseException:
            self._unlock()
            raise
        if self.resumed:
            self._write_log()  # back to where the checkpoint stands
            self.best = self._accuracy_of_best()
        return self

    def __exit__(self, *_: object) -> None:
        if self.directory is not None:
            self.log.close()
            self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def after_step(self) -> None:
        if self.directory is not None and (self.asked or self.training.step % self.save_every == 0):
            self.asked = False
            self._try_to_save(place(self.directory, self.training.step))

    def after_epoch(self) -> None:
        """Write the log, then the best checkpoint, then the one from which a resumed run would do all that again."""
        if self.directory is None:
            return
        self._write_log()
        result = self._accuracy(self.training.epochs[-1])
        beaten = result > self.best or not (self.directory / BEST).exists()
        if beaten and self._try_to_save(self.directory / BEST, best=True):
            self.best = result
        self._try_to_save(place(self.directory, self.training.step))

    def save(self) -> None:
        """Write a checkpoint. Raises FileError if that is not possible."""
        if self.directory is not None:
            self._save(place(self.directory, self.training.step))

    def rescue(self) -> str:
        """After an exception: save if the training stands between two steps and has taken any. Return how to go on, or
        nothing if there is nothing to lose."""
        if self.training.intact and self.training.step > self.began:
            with suppress(Exception):  # the exception that ends the run matters more; the sentence says what is saved
                self.save()
        return self.how_to_go_on("the training has ended") if self.training.step or self._own() else ""

    def how_to_go_on(self, what: str) -> str:
        """A sentence for whoever stopped the training."""
        found = self._own()
        if self.directory is None or not found:
            return f"{what}; nothing was saved"
        path, step = found[0]
        # A directory stands for its newest checkpoint, which may be one from which this run went back.
        newest = next(iter(find_checkpoints(self.directory)), None)
        where = shlex.quote(str(self.directory if path == newest else path))
        saved = f"saved in {BEST}" if path.name == BEST else "saved"
        return f"{what}; {saved} up to step {step:,}: go on with python -m inception train --resume {where}{self.again}"

    def how_to_go_back(self) -> str:
        """A sentence for whoever trained until something was not finite."""
        found = self._own()
        if not found:
            return "nothing was saved"
        return (
            f"{found[0][0]} is from before; --resume repeats what came after it bit for bit (--backend numpy, where it "
            "was another, names the layer): train anew with other options, or look at it with minigrad.watch"
        )

    def older(self) -> list[Path]:
        """The run's checkpoints but the newest, the oldest first."""
        return [path for path, _ in reversed(self._own()[1:])]

    def _own(self) -> list[tuple[Path, int]]:
        """The checkpoints of this run with their steps, the newest first; the best one if there is no other. Later ones
        belong to a run that was resumed from an earlier point."""
        if self.directory is None:
            return []
        last = [(path, step_of(path)) for path in find_checkpoints(self.directory)]
        last = [(path, step) for path, step in last if step <= self.training.step]
        if last or not (self.directory / BEST).exists():
            return last
        try:
            step = int(read_checkpoint(self.directory / BEST).state["step"])
        except (WeightsError, KeyError, TypeError, ValueError, OverflowError):
            return []
        return [(self.directory / BEST, step)] if step <= self.training.step else []

    def _accuracy_of_best(self) -> float:
        """What `after_epoch` has to beat: that of the last epoch in the best checkpoint; −1 if there is none."""
        try:
            assert self.directory is not None
            epochs = read_checkpoint(self.directory / BEST).state["epochs"]
            return self._accuracy(epoch_of(epochs[-1]))
        except (WeightsError, AttributeError, KeyError, IndexError, TypeError, ValueError):
            return -1.0

    def _accuracy(self, epoch: Epoch) -> float:
        result = epoch.average if self.training.test_average and epoch.average else epoch.test
        return result.accuracy if result else 0.0

    def _write_log(self) -> None:
        average = self.training.average is not None
        rows = [row_of(epoch, watched=self.watched, average=average) for epoch in self.training.epochs]
        self._make_again()
        with self.finished():
            self.log.write(rows)

    def _try_to_save(self, path: Path, best: bool = False) -> bool:
        """Whether it is there; if not, a warning has said why."""
        try:
            self._save(path, best)
        except FileError as error:
            older = self._own()
            kept = f"; the last one, {older[0][0]}, is whole" if older else ""
            console.warning(f"{error}{kept}; training goes on and will try again")
            return False
        return True

    def _save(self, path: Path, best: bool = False) -> None:
        about = self.about
        if best and not self.training.test_average:  # it is the best by its weights as trained
            about = about | {"average_count": 0.0, "weights": "as trained"}
        self._make_again()
        with self.finished():
            save_checkpoint(path, self.training, about, self.run)
            for old, _ in self._own()[self.keep :]:
                self._delete(old)

    def _delete(self, old: Path) -> None:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            if old not in self.stuck:
                console.warning(f"{old} is not needed any more and cannot be deleted ({error.strerror})")
            self.stuck.add(old)

    def _make_again(self) -> None:
        """If the directory was moved or removed meanwhile, go on in a new one."""
        assert self.directory is not None
        if self.directory.is_dir():
            return
        with suppress(OSError):  # writing there will say why
            self.directory.mkdir(parents=True)
            console.warning(f"{self.directory} was gone and has been made again: what it held is not in it")
            self._unlock()
            try:
                self.lock = _lock(self.directory)
            except CheckpointError as error:  # as soon as it was there, another process took it
                console.warning(str(error))


def check_free(directory: Path) -> None:
    """Raise CheckpointError if the directory holds a run."""
    if find_checkpoints(directory) or (directory / BEST).exists():
        raise CheckpointError(
            f"{directory} holds a run already: go on with it (--resume {directory}), or name another directory (--out)"
        )
    if (directory / "log.jsonl").exists():
        raise CheckpointError(
            f"{directory} holds the log of a run, but no checkpoint to go on from: name another directory (--out), or "
            f"remove {directory / 'log.jsonl'} to train there anew"
        )


def _lock(directory: Path) -> int | None:
    """Hold the directory for this process, until the descriptor returned is closed or the process ends.

    None, with a warning, where the system or the file system knows no such locks.
    Raises CheckpointError if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise CheckpointError(f"{directory}: another process is training there; wait for it or stop it") from None
        console.warning(f"{directory} cannot be locked ({error.strerror}): see that no other process trains there")
        return None
    return descriptor


def write_somewhere(write: Callable[[Path], None], wanted: Path, spare: list[Path]) -> Path:
    """Write a file that must not be lost, by preference to `wanted`, and return where it is.

    write   writes to a path; raises FileError if that is not possible
    spare   files to delete, one after the other, if there is no room

    If the directory is gone, it is made again; if nothing else helps, the file goes to the working directory, or to the
    system's temporary one, under a name that is free. A warning says so.
    Raises the first FileError if no place can be written.
    """
    try:
        with suppress(OSError):
            wanted.parent.mkdir(parents=True, exist_ok=True)
        write(wanted)
        return wanted
    except FileError as error:
        first = error
    reason = getattr(first.__context__, "errno", None)
    for path in spare if reason in (errno.ENOSPC, errno.EDQUOT) else ():
        with suppress(OSError, FileError):
            path.unlink()
            console.warning(f"{path} was deleted to make room for {wanted}")
            write(wanted)
            return wanted
    for find in (Path.cwd, tempfile.gettempdir):
        with suppress(OSError, FileError):
            elsewhere = _free(Path(find()) / f"{wanted.absolute().parent.name}-{wanted.name}")
            write(elsewhere)
            console.warning(f"{first}; written to {elsewhere} instead")
            return elsewhere
    raise first


def _free(path: Path) -> Path:
    """The path, or the first of NAME-2, NAME-3, … that does not exist."""
    names = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
