"""Weights on disk: our .npz, safetensors, and PyTorch's .pth and .ckpt, written by us or by others.

Whatever the file, nothing in it is executed. What `about` says of a model:

    model, options      what create_model builds
    classes             their names, in the order of the outputs
    size, mean, std     how pictures are prepared, with more of data.Preprocessing where it differs from its defaults
    …                   and what is worth knowing, as data, command, test_accuracy
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inception.download import Published, fetch
from inception.models import Inception, create_model
from inception.weights import names
from inception.weights.npz import (
    ABOUT,
    CHECKPOINT,
    FORMAT,
    WeightsError,
    as_text,
    read_arrays,
    read_npz,
    take_description,
    write_arrays,
    write_npz,
)
from inception.weights.pytorch import read_pytorch, write_pytorch
from inception.weights.safetensors import read_safetensors, write_safetensors
from minigrad.errors import MinigradError, no_such
from minigrad.nn import Module

_SHIPPED = Path(__file__).with_name("shipped")
_NEEDED = ("model", "options", "classes", "mean", "std", "size")


def save_weights(path: Path, model: Module, about: dict[str, Any]) -> None:
    """Write the model's state to `path`: a new file takes the old one's place at once, or nothing changes.

    path    .safetensors and .pth are written as such, anything else as .npz, unless the name says otherwise
            (`check_suffix`). A .pth has the names of the project whose network it is (see names.PROJECTS), if there is
            one, so that its own code loads it
    about   what `load_model` and `predict` need: model, options (of create_model), classes, mean, std, size;
            and whatever else is worth knowing, as plain JSON values
    """
    check_suffix(path)
    state = model.state_dict()
    if path.suffix == ".safetensors":
        write_safetensors(path, state, {ABOUT: json.dumps({"format": FORMAT, **about})})
    elif path.suffix == ".pth":
        theirs = names.outward(model)
        write_pytorch(path, {theirs[name]: array for name, array in state.items()}, {"format": FORMAT, **about})
    else:
        write_npz(path, state, about)


def check_suffix(path: Path) -> None:
    """Raise WeightsError where the name of a file to be written promises a kind that `save_weights` does not write."""
    if path.suffix in (".pt", ".ckpt", ".onnx"):
        raise WeightsError(f"{path}: weights are written as .npz, .safetensors or .pth, not as {path.suffix}")


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and `about`, which is empty if the file is not ours; of a checkpoint those to use it with.

    Raises WeightsError naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return read_npz(path)  # says what is wrong
    if path.suffix == ".safetensors" or start[8:] == b"{":
        arrays, texts = read_safetensors(path)
        return arrays, _described(path, texts)
    if start.startswith(b"\x80") or path.suffix in (".pth", ".pt", ".ckpt"):
        return read_pytorch(path)
    return read_npz(path)


def _described(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a safetensors file say in our way."""
    if ABOUT not in texts:
        return {}
    return take_description(path, {ABOUT: np.array(texts[ABOUT])}, ABOUT, FORMAT)


def load_model(path: Path, name: str | None = None) -> tuple[Inception, dict[str, Any]]:
    """The model that a weights file describes, with its weights, in evaluation mode; and `about`.

    name   of the network: for a file of another project in which the names of the arrays do not tell it. The arrays
           are then taken by their order. `about` says what has been done under "source", and numbers the classes.
    """
    arrays, about = load_weights(path)
    try:
        if not about:
            model, about = names.adopt(arrays, name)
            count = about["options"]["num_classes"]
            if len(about.get("classes", ())) != count:
                about["classes"] = [str(k) for k in range(count)]
            model.eval()
            return model, about
        if name not in (None, about.get("model")):
            raise WeightsError(f"it holds {about.get('model')}, not {name}: leave out --model")
        if lacking := [key for key in _NEEDED if key not in about]:
            raise WeightsError(f"its description lacks {', '.join(lacking)}")
        model = create_model(about["model"], **about["options"])
        model.load_state_dict(names.inward(model, arrays))
        check_classes(about["classes"], model.fc1.weight.shape[0])
    except (MinigradError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from None
    model.eval()
    return model, about


def check_classes(given: Any, count: int) -> None:
    """Raise WeightsError unless these are the names of so many classes."""
    if isinstance(given, list) and len(given) == count and all(isinstance(name, str) for name in given):
        return
    got = f"a list of {len(given)}" if isinstance(given, list) else type(given).__name__
    raise WeightsError(f"classes must be the {count} names of the outputs, in order, got {got}")


def shipped(name: str | None = None) -> Path:
    """The file of a model that comes with the package: by the name of the file, or the first by name.

    Raises WeightsError that says what there is.
    """
    found = _shipped_files()
    if not found:
        raise WeightsError(
            "no trained model is shipped with this version: train one (python -m inception train --data cifar10), and "
            "give its file (predict --weights runs/cifar10-googlenet_small/weights.npz PICTURE)"
        )
    if name is None:
        return next(iter(found.values()))
    if name not in found:
        raise WeightsError(no_such("file and no shipped model", name, found))
    return found[name]


def is_shipped(name: str | Path) -> bool:
    """Whether a trained model of this name comes with the package, and no file here has that name."""
    return str(name) in _shipped_files() and not Path(name).exists()


def _shipped_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def is_address(place: str | Path) -> bool:
    """Whether `find_weights` would download it."""
    return str(place).startswith(("https://", "http://"))


def find_weights(place: str | Path, *, quiet: bool = False) -> Path:
    """The file of weights that `place` means.

    place   a file
            NAME                    without a suffix, of a model that comes with this package
            ADDRESS#sha256=DIGITS   http:// or https://, downloaded once and kept (`inception.download`); without
                                    the hash if it ends the file's name, as in torchvision's googlenet-1378be20.pth

    Raises WeightsError where no model has this name; DownloadError if the file cannot be had.
    """
    if is_address(place):
        return fetch((Published.at(str(place)),), quiet=quiet)
    path = Path(place)
    return path if path.suffix or path.exists() else shipped(str(place))


__all__ = [
    "ABOUT",
    "CHECKPOINT",
    "FORMAT",
    "WeightsError",
    "as_text",
    "check_classes",
    "check_suffix",
    "find_weights",
    "is_address",
    "is_shipped",
    "load_model",
    "load_weights",
    "read_arrays",
    "save_weights",
    "shipped",
    "take_description",
    "write_arrays",
]
