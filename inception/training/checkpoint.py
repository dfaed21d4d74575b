"""Checkpoints: one `.npz` from which a training goes on bit for bit, also in the middle of an epoch.

    conv1.conv.weight …     weights and buffers, as in a weights file: a checkpoint can be used like one
    optimizer/…             the optimizer's state
    average/…               sums of the average of the weights, if the recipe has one
    sums/…                  losses and hits added up in the epoch that runs
    about.json              what the weights are, for those who use them
    checkpoint.json         where the training stands, its log, its recipe and its options

It is read with `allow_pickle=False`: nothing in it is ever executed. Random numbers have no state to be kept: they
are functions of seed, step and picture (minigrad.random).
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception import weights
from inception.files import FileError, check_place
from inception.training.log import Log, row_of
from inception.training.loop import Epoch, Evaluation, Sums, Training, warn
from inception.weights import ABOUT, CHECKPOINT, WeightsError
from minigrad import backend
from minigrad.errors import MinigradError, NonFiniteError

FORMAT = 1
BEST = "best.npz"


class CheckpointError(WeightsError):
    """A checkpoint cannot be read, or does not fit what it is to continue."""


class Checkpoint(NamedTuple):
    """What was read: arrays by name, and `state`, the JSON value of checkpoint.json."""

    path: Path
    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


def save_checkpoint(path: Path, training: Training, about: dict[str, Any], run: dict[str, Any]) -> None:
    """Write all that `training` is at this moment; the old file is replaced at once, or not at all.

    about   as in `save_weights`
    run     whatever else is needed to go on, as plain JSON values
    Raises  FileError if it cannot be written, NonFiniteError if the losses or weights are not finite.
    """
    sums, average = training.sums, training.average
    training.check_losses()
    arrays = training.model.state_dict()
    if broken := next((name for name, x in arrays.items() if not np.isfinite(x).all()), None):
        raise NonFiniteError(f"{broken} is not finite after step {training.step:,}, though the loss still was", "")
    arrays |= {f"optimizer/{name}": backend.to_host(x) for name, x in training.optimizer.state_dict().items()}
    if average is not None:
        arrays |= {f"average/{name}": backend.to_host(x) for name, x in average.sums.items()}
    if sums.steps:
        arrays |= {f"sums/{name}": backend.to_host(x) for name, x in (sums.totals | {"hits": sums.hits}).items()}
    count = average.count if average is not None else 0.0
    state = {
        "format": FORMAT,
        "step": training.step,
        "epochs": [epoch._asdict() for epoch in training.epochs],
        "sums": {"steps": sums.steps, "seen": sums.seen, "seconds": sums.seconds},
        "average_count": count,
        "recipe": training.recipe.to_json(),
        "run": run,
    }
    arrays[ABOUT] = weights.as_text({"format": weights.FORMAT, "average_count": count, **about})
    arrays[CHECKPOINT] = weights.as_text(state)
    weights.write_arrays(path, arrays)


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises WeightsError naming the file, if it is damaged, no checkpoint, or of a newer version."""
    arrays = weights.read_arrays(path)
    if CHECKPOINT not in arrays:
        kind = "weights without a training to go on with" if ABOUT in arrays else "not written by this project"
        raise CheckpointError(f"{path}: no checkpoint ({kind})")
    state = weights.take_description(path, arrays, CHECKPOINT, FORMAT)
    arrays.pop(ABOUT, None)
    return Checkpoint(path, arrays, state)


def restore(checkpoint: Checkpoint, training: Training) -> None:
    """Put `training`, just built, to where the checkpoint stands.

    Raises CheckpointError if it is of another model or recipe, or inconsistent.
    """
    path, arrays, state = checkpoint
    groups: dict[str, dict[str, np.ndarray]] = {"": {}, "optimizer/": {}, "average/": {}, "sums/": {}}
    for name, array in arrays.items():
        prefix = name[: name.find("/") + 1]
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = array
    try:
        if wrong := groups.keys() - {"", "optimizer/", "average/", "sums/"}:
            raise CheckpointError(f"unknown parts {sorted(wrong)}")
        _restore_arrays(training, groups)
        _restore_position(training, state)
    except (MinigradError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = str(error) if isinstance(error, MinigradError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be continued: {reason}") from None


def _restore_arrays(training: Training, groups: dict[str, dict[str, np.ndarray]]) -> None:
    own = training.model.state_dict()
    for part in ("", "average/"):
        for name, array in groups[part].items():
            if name in own and array.dtype != own[name].dtype:
                raise CheckpointError(f"{part}{name} is {array.dtype} instead of {own[name].dtype}")
    training.model.load_state_dict(groups[""])
    training.optimizer.load_state_dict(groups["optimizer/"])
    totals = training.average.sums if training.average is not None else {}
    if totals.keys() != groups["average/"].keys():
        raise CheckpointError("its average is not of this model's weights")
    for name, total in totals.items():
        if total.shape != groups["average/"][name].shape:
            raise CheckpointError(f"average/{name} has {groups['average/'][name].shape} instead of {total.shape}")
        total[...] = backend.asarray(groups["average/"][name])
    sums = groups["sums/"]
    if any(x.shape != () or x.dtype.kind not in "if" for x in sums.values()):
        raise CheckpointError("its sums of the running epoch are not numbers")
    if sums:
        hits = sums.pop("hits")
        training.sums.hits = backend.asarray(hits)
        training.sums.totals = {name: backend.asarray(x) for name, x in sums.items()}


def _restore_position(training: Training, state: dict[str, Any]) -> None:
    steps = len(training.loader)
    sums: Sums = training.sums
    training.step = int(state["step"])
    training.epochs = [_epoch(row) for row in state["epochs"]]
    sums.steps, sums.seen = int(state["sums"]["steps"]), int(state["sums"]["seen"])
    sums.seconds = float(state["sums"]["seconds"])
    if training.average is not None:
        training.average.count = float(state["average_count"])
    done = len(training.epochs)
    if not (
        0 <= sums.steps <= steps
        and training.step == done * steps + sums.steps
        and done + (sums.steps > 0) <= training.recipe.epochs
        and (sums.steps > 0) == bool(sums.totals)
    ):
        raise CheckpointError(f"step {training.step} after {done} epochs of {steps} steps does not fit together")


def _epoch(row: dict[str, Any]) -> Epoch:
    """The inverse of Epoch._asdict, after JSON."""
    values: dict[str, Any] = {name: float(row[name]) for name in ("lr", "accuracy", "seconds", "pictures_per_second")}
    values |= {name: row[name] and Evaluation(*map(float, row[name])) for name in ("test", "average")}
    values["losses"] = {str(name): float(value) for name, value in row["losses"].items()}
    return Epoch(number=int(row["number"]), step=int(row["step"]), **values)


# ---- The directory of a run ----


class Keeper:
    """Keeps a training safe in the directory of its run: the log, the last checkpoints and the best one.

    directory    None: nothing is kept
    run          what `resumed` needs, as plain JSON values
    watched      what the log calls the pictures evaluated on
    save_every   steps between two checkpoints, besides those after every epoch
    keep         how many of the last checkpoints stay
    resumed      the directory may hold a run: this one

    Enter it before training. A checkpoint that cannot be written is a warning, as long as training can go on.
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
    ):
        self.training, self.about, self.run, self.directory = training, about, run, directory
        self.watched, self.save_every, self.keep = watched, save_every, keep
        self.tensorboard, self.resumed = tensorboard, resumed
        self.best = -1.0  # accuracy of the best checkpoint

    def __enter__(self) -> None:
        if self.directory is None:
            return
        if not self.resumed and holds_a_run(self.directory):
            raise CheckpointError(
                f"{self.directory} holds a run already: go on with it (--resume {self.directory}), "
                f"or name another directory (--out)"
            )
        check_place(place(self.directory, 0))
        self.lock = _lock(self.directory)
        try:
            for path in self.directory.glob(".*"):  # of a process that was killed while it wrote
                if re.fullmatch(r"\..+\.(npz|jsonl|csv|png)\.\d+", path.name):
                    path.unlink()
            self.log = Log(self.directory, warn, tensorboard=self.tensorboard, step=self.training.step)
        except BaseException:
            self._unlock()
            raise
        if self.resumed:
            self._write_log()  # back to where the checkpoint stands
            self.best = self._accuracy_of_best()

    def __exit__(self, *_: object) -> None:
        if self.directory is not None:
            self.log.close()
            self._unlock()

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def after_step(self) -> None:
        if self.directory is not None and self.training.step % self.save_every == 0:
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

    def how_to_go_on(self, what: str) -> str:
        """A sentence for whoever stopped the training."""
        found = self._own()
        if self.directory is None or not found:
            return f"{what}; nothing was saved"
        # A directory stands for its newest checkpoint, which may be one from which this run went back.
        newest = find_checkpoints(self.directory)[0]
        where = shlex.quote(str(self.directory if found[0] == newest else found[0]))
        return f"{what}; saved up to step {_step(found[0]):,}: go on with python -m inception train --resume {where}"

    def how_to_go_back(self) -> str:
        """A sentence for whoever trained until something was not finite."""
        found = self._own()
        if not found:
            return "nothing was saved"
        return (
            f"{found[0]} is from before; --resume repeats what came after it bit for bit (--backend numpy, where it "
            "was another, names the layer): train anew with other options, or look at it with minigrad.watch"
        )

    def _own(self) -> list[Path]:
        """The checkpoints of this run, the newest first. Later ones are of a run from which this one went back."""
        found = find_checkpoints(self.directory) if self.directory is not None else []
        return [path for path in found if _step(path) <= self.training.step]

    def _accuracy_of_best(self) -> float:
        """What `after_epoch` has to beat: that of the last epoch in the best checkpoint; −1 if there is none."""
        try:
            assert self.directory is not None
            epochs = read_checkpoint(self.directory / BEST).state["epochs"]
            return self._accuracy(_epoch(epochs[-1]))
        except (WeightsError, KeyError, IndexError, TypeError, ValueError):
            return -1.0

    def _accuracy(self, epoch: Epoch) -> float:
        result = epoch.average if self.training.test_average and epoch.average else epoch.test
        return result.accuracy if result else 0.0

    def _write_log(self) -> None:
        average = self.training.average is not None
        self.log.write([row_of(epoch, watched=self.watched, average=average) for epoch in self.training.epochs])

    def _try_to_save(self, path: Path, best: bool = False) -> bool:
        """Whether it is there; if not, a warning has said why."""
        try:
            self._save(path, best)
        except FileError as error:
            older = self._own()
            kept = f"; the last one, {older[0]}, is whole" if older else ""
            warn(f"{error}{kept}; training goes on and will try again")
            return False
        return True

    def _save(self, path: Path, best: bool = False) -> None:
        about = self.about
        if best and not self.training.test_average:  # it is the best by its weights as trained
            about = about | {"average_count": 0.0, "weights": "as trained"}
        save_checkpoint(path, self.training, about, self.run)
        for old in self._own()[self.keep :]:
            old.unlink(missing_ok=True)


def holds_a_run(directory: Path) -> bool:
    return bool(find_checkpoints(directory)) or (directory / "log.jsonl").exists()


def _lock(directory: Path) -> int | None:
    """Hold the directory for this process, until the descriptor returned is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CheckpointError(f"{directory}: another process is training there; wait for it or stop it") from None
    return descriptor


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint after this many steps lies."""
    return directory / f"checkpoint-{step:08d}.npz"


def find_checkpoints(directory: Path) -> list[Path]:
    """Those of a run, the newest first; the best one is not among them."""
    found = [path for path in directory.glob("checkpoint-*.npz") if re.fullmatch(r"checkpoint-\d+", path.stem)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def open_checkpoint(where: Path) -> Checkpoint:
    """Read a file, or the newest checkpoint of a directory.

    Raises CheckpointError if it is not whole, naming the next older one that is.
    """
    if where.is_dir():
        found = find_checkpoints(where)
        if not found:
            raise CheckpointError(f"{where}: there is no checkpoint in this directory (checkpoint-….npz)")
        where = found[0]
    try:
        return read_checkpoint(where)
    except WeightsError as error:
        others = [path for path in find_checkpoints(where.parent) if path != where]
        if re.fullmatch(r"checkpoint-\d+", where.stem):
            others = [path for path in others if _step(path) < _step(where)]
        older = next((path for path in others if _is_whole(path)), None)
        advice = f"; the next older one, {older}, is whole: --resume {older}" if older else ""
        raise CheckpointError(f"{error}{advice}") from None


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except WeightsError:
        return False
    return True
