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

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception import weights
from inception.training.loop import Epoch, Evaluation, Sums, Training
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
        raise NonFiniteError(
            f"{broken} is not finite after step {training.step:,}, though the loss was: try a lower learning rate",
            "",
        )
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
    except (MinigradError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
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
    training.epochs = [epoch_of(row) for row in state["epochs"]]
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


def epoch_of(row: dict[str, Any]) -> Epoch:
    """The inverse of Epoch._asdict, after JSON."""
    values: dict[str, Any] = {name: float(row[name]) for name in ("lr", "accuracy", "seconds", "pictures_per_second")}
    values |= {name: row[name] and Evaluation(*map(float, row[name])) for name in ("test", "average")}
    values["losses"] = {str(name): float(value) for name, value in row["losses"].items()}
    return Epoch(number=int(row["number"]), step=int(row["step"]), **values)


# ---- The files in a run's directory ----


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint after this many steps lies."""
    return directory / f"checkpoint-{step:08d}.npz"


def find_checkpoints(directory: Path) -> list[Path]:
    """Those of a run, the newest first; the best one is not among them."""
    found = [path for path in directory.glob("checkpoint-*.npz") if re.fullmatch(r"checkpoint-\d+", path.stem)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def open_checkpoint(where: Path) -> Checkpoint:
    """Read a file, or the newest checkpoint of a directory; its best one, if there is no other.

    Raises CheckpointError if it is not whole, naming the next older one that is.
    """
    if where.is_dir():
        found = [*find_checkpoints(where), where / BEST]
        if not found[0].exists():
            raise CheckpointError(
                f"{where}: there is no checkpoint in this directory (checkpoint-….npz), so nothing to go on from: "
                "train anew, in another directory (--out)"
            )
        where = found[0]
    try:
        return read_checkpoint(where)
    except WeightsError as error:
        others = [path for path in find_checkpoints(where.parent) if path != where]
        if re.fullmatch(r"checkpoint-\d+", where.stem):
            others = [path for path in others if step_of(path) < step_of(where)]
        older = next((path for path in others if _is_whole(path)), None)
        advice = f"; the next older one, {older}, is whole: --resume {older}" if older else ""
        raise CheckpointError(f"{error}{advice}") from None


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except WeightsError:
        return False
    return True
