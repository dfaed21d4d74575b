"""Weights on disk: one `.npz` with every array of the model, and what is needed to use it again.

The file is read with `allow_pickle=False`: nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from inception.models import create_model
from minigrad.errors import MinigradError
from minigrad.nn import Module

FORMAT = 1
_ABOUT = "about.json"
_NEEDED = ("model", "options", "classes", "mean", "std", "size")


class WeightsError(MinigradError, ValueError):
    """A weights file cannot be read, or is not one of ours."""


def save_weights(path: Path, model: Module, about: dict[str, Any]) -> None:
    """Write the model's state to `path`: a new file takes the old one's place at once, or nothing changes.

    about   what `load_model` and `predict` need: model, options (of create_model), classes, mean, std, size;
            and whatever else is worth knowing, as plain JSON values
    """
    arrays = model.state_dict()
    arrays[_ABOUT] = np.array(json.dumps({"format": FORMAT, **about}))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_place(path: Path) -> None:
    """Make the folder of `path` and write a file there once: before training, not after it, is the time to fail.

    Raises WeightsError if weights cannot be written to `path`.
    """
    if path.exists() and not path.is_file():  # /dev/null too must not be replaced
        raise WeightsError(f"{path}: weights cannot be written there (a directory or a device, not a file)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise WeightsError(f"{path}: weights cannot be written there ({error.strerror})") from None


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and `about`. Raises WeightsError naming the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:  # np.load itself would leave a damaged file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise WeightsError(f"{path}: one bare array, not a weights file (.npz)")
            arrays = {name: archive[name] for name in archive.files}
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged archive can raise anything, MemoryError included
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{path}: not a readable .npz file ({reason}); it may be damaged or cut short") from None
    if _ABOUT not in arrays:
        raise WeightsError(f"{path}: an .npz file, but not written by this project (it lacks {_ABOUT!r})")
    try:
        about = json.loads(str(arrays.pop(_ABOUT)))
        version = about["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{path}: its description {_ABOUT!r} is damaged") from None
    if version != FORMAT:
        raise WeightsError(f"{path}: written in format {version}, this version reads format {FORMAT}: update it")
    return arrays, about


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
