"""Weights on disk: one `.npz` with every array of the model, and what is needed to use it again.

The file is read with `allow_pickle=False`: nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from inception.models import create_model
from minigrad.errors import MinigradError
from minigrad.nn import Module

FORMAT = 1
_ABOUT = "about.json"


class WeightsError(MinigradError, ValueError):
    """A weights file cannot be read, or is not one of ours."""


def save_weights(path: Path, model: Module, about: dict[str, Any]) -> None:
    """Write the model's state to `path`: a new file takes the old one's place at once, or nothing changes.

    about   what `load_model` and `predict` need: model, options (of create_model), classes, mean, std, size;
            and whatever else is worth knowing, as plain JSON values
    """
    arrays = model.state_dict()
    arrays[_ABOUT] = np.array(json.dumps({"format": FORMAT, **about}))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and `about`. Raises WeightsError naming the file and what is wrong with it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise WeightsError(f"{path}: one bare array, not a weights file (.npz)")
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: not a readable .npz file ({error}); it may be damaged or cut short") from None
    if _ABOUT not in arrays:
        raise WeightsError(f"{path}: an .npz file, but not written by this project (it lacks {_ABOUT!r})")
    try:
        about = json.loads(str(arrays.pop(_ABOUT)))
        version = about["format"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise WeightsError(f"{path}: its description {_ABOUT!r} is damaged") from None
    if version != FORMAT:
        raise WeightsError(f"{path}: written in format {version}, this version reads format {FORMAT}: update it")
    return arrays, about


def load_model(path: Path) -> tuple[Module, dict[str, Any]]:
    """The model that a weights file describes, with its weights, in evaluation mode; and `about`."""
    arrays, about = load_weights(path)
    try:
        name, options = about["model"], about["options"]
    except KeyError as missing:
        raise WeightsError(f"{path}: its description lacks {missing}") from None
    model = create_model(name, **options)
    try:
        model.load_state_dict(arrays)
    except MinigradError as error:
        raise WeightsError(f"{path}: {error}") from None
    return model.eval(), about
