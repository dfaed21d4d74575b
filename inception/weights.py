"""Weights on disk: one `.npz` with every array of the model, and what is needed to use it again.

The file is read with `allow_pickle=False`: nothing in it is ever executed. A checkpoint (training/checkpoint.py) is
such a file with more in it, and can be used like one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inception.models import create_model
from minigrad.errors import MinigradError
from minigrad.nn import Module

FORMAT = 1
ABOUT, CHECKPOINT = "about.json", "checkpoint.json"  # what describes weights; what makes a file a checkpoint too
_NEEDED = ("model", "options", "classes", "mean", "std", "size")


class WeightsError(MinigradError, ValueError):
    """A weights file cannot be read, or is not one of ours."""


def save_weights(path: Path, model: Module, about: dict[str, Any]) -> None:
    """Write the model's state to `path`: a new file takes the old one's place at once, or nothing changes.

    about   what `load_model` and `predict` need: model, options (of create_model), classes, mean, std, size;
            and whatever else is worth knowing, as plain JSON values
    """
    write_arrays(path, {**model.state_dict(), ABOUT: as_text({"format": FORMAT, **about})})


def as_text(description: dict[str, Any]) -> np.ndarray:
    """A description as an array of one string, which an .npz can hold."""
    return np.array(json.dumps(description))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz by `replace_file`."""
    replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write beside `path`, and put the file in its place once it is on the disk: there is the old one or the new.

    Raises WeightsError naming the file if that fails, for example for want of space; the old one is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)  # the name, too, must survive a power cut
    except OSError as error:
        raise WeightsError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_place(path: Path) -> None:
    """Make the folder of `path` and write a file there once: before training, not after it, is the time to fail.

    Raises WeightsError if no file can be written to `path`.
    """
    if path.exists() and not path.is_file():  # /dev/null too must not be replaced
        raise WeightsError(f"{path} cannot be written (it is a directory or a device, not a file)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror})") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name. Raises WeightsError naming the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:  # np.load itself would leave a damaged file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise WeightsError(f"{path}: one bare array, not a weights file (.npz)")
            return {name: archive[name] for name in archive.files}
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged archive can raise anything, MemoryError included
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path}: not a readable .npz file ({reason}); it may be damaged or cut short") from None


def take_description(path: Path, arrays: dict[str, np.ndarray], name: str, newest: int) -> dict[str, Any]:
    """Remove a description from the arrays and return it. Raises WeightsError if it cannot be understood."""
    try:
        description = json.loads(str(arrays.pop(name)))
        version = description["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{path}: its description {name!r} is damaged") from None
    if version != newest:
        raise WeightsError(f"{path}: written in format {version}, this version reads format {newest}: update it")
    return description


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and `about`; of a checkpoint those by which a model is used, averaged if it says so.

    Raises WeightsError naming the file and what is wrong with it.
    """
    arrays = read_arrays(path)
    if ABOUT not in arrays:
        raise WeightsError(f"{path}: an .npz file, but not written by this project (it lacks {ABOUT!r})")
    about = take_description(path, arrays, ABOUT, FORMAT)
    if arrays.pop(CHECKPOINT, None) is None:
        return arrays, about
    try:
        if count := about["average_count"]:
            averages = {name.removeprefix("average/"): x for name, x in arrays.items() if name.startswith("average/")}
            return {name: x * (1.0 / count) for name, x in averages.items()}, about
    except (KeyError, TypeError):
        raise WeightsError(f"{path}: its description {ABOUT!r} does not say how its average was taken") from None
    return {name: x for name, x in arrays.items() if "/" not in name}, about


def load_model(path: Path) -> tuple[Module, dict[str, Any]]:
    """The model that a weights file describes, with its weights, in evaluation mode; and `about`."""
    arrays, about = load_weights(path)
    if lacking := [name for name in _NEEDED if name not in about]:
        raise WeightsError(f"{path}: its description lacks {', '.join(lacking)}")
    try:
        model = create_model(about["model"], **about["options"])
        model.load_state_dict(arrays)
    except (MinigradError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from None
    return model.eval(), about
