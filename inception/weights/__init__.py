"""Weights on disk: our .npz, safetensors, and PyTorch's .pth and .ckpt, written by us or by others.

Whatever the file, nothing in it is executed. What `about` says of a model:

    model, options      what create_model builds
    classes             their names, in the order of the outputs
    size, mean, std     how pictures are prepared, with more of data.Preprocessing where it differs from its defaults
    …                   and what is worth knowing, as data, command, test_accuracy
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inception.download import Published, fetch
from inception.files import FileError, allow, open_file
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
from minigrad import nn
from minigrad.errors import MinigradError, no_such
from minigrad.nn import Module

_SHIPPED = Path(__file__).with_name("shipped")
_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_LARGEST = 2048  # pixels a side of the pictures that a file may ask for
_NEEDED = ("model", "options", "classes", "mean", "std", "size")


def save_weights(path: Path, model: Module, about: dict[str, Any]) -> None:
    """Write the model's state to `path`: a new file takes the old one's place at once, or nothing changes.

    path    .safetensors and .pth are written as such, anything else as .npz, unless the name says otherwise
            (`check_suffix`). These two have the names of the project whose network it is (projects.PROJECTS), so that
            its own code loads them, or else ours in PyTorch's words
    about   what `load_model` and `predict` need: model, options (of create_model), classes, mean, std, size;
            and whatever else is worth knowing, as plain JSON values
    """
    check_suffix(path)
    state, described, theirs = model.state_dict(), {"format": FORMAT, **about}, names.outward(model)
    if path.suffix == ".safetensors":
        write_safetensors(path, {theirs[n]: array for n, array in state.items()}, {ABOUT: json.dumps(described)})
    elif path.suffix == ".pth":
        write_pytorch(path, {theirs[n]: array for n, array in state.items()}, described)
    else:
        write_npz(path, state, about)


def check_suffix(path: Path) -> None:
    """Raise WeightsError where the name of a file to be written promises a kind that `save_weights` does not write."""
    if path.suffix.lower() in (".pt", ".ckpt", ".bin", ".onnx"):
        raise WeightsError(f"{path}: weights are written as .npz, .safetensors or .pth, not as {path.suffix}")


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and `about`, which is empty if the file is not ours; of a checkpoint those to use it with.

    The content says which kind of file it is, not the name. Raises WeightsError naming the file and what is wrong.
    """
    kind = _kind(path)
    if kind in ("", ".zip"):  # a damaged file: the reader that its name suggests says what is wrong
        kind = path.suffix.lower()
    if kind == ".safetensors":
        arrays, texts = read_safetensors(path)
        return arrays, _described(path, texts)
    if kind in (".pth", ".pt", ".ckpt", ".bin", ".tar"):
        return read_pytorch(path)
    return read_npz(path)


def _kind(path: Path) -> str:
    """.safetensors, .pth or .npz, as the content has it; .zip for an archive that is damaged or of something else;
    nothing for other files, and those that cannot be opened.
    """
    try:
        with open_file(path) as file:
            start = file.read(9)
            if start.startswith(b"PK"):
                return _kind_of_archive(file)
    except (FileError, OSError):
        return ""
    if start[8:] == b"{":
        return ".safetensors"
    return ".pth" if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") else ""


def _kind_of_archive(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive can raise anything
        return ".zip"
    if any(name.endswith("/data.pkl") for name in names):
        return ".pth"
    return ".npz" if any(name.endswith(".npy") for name in names) else ".zip"


def are_weights(path: Path) -> bool:
    """Whether a file holds weights, or has a name that says so."""
    return path.suffix.lower() in _SUFFIXES or bool(_kind(path))


def _described(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a safetensors file say in our way."""
    if ABOUT not in texts:
        return {}
    return take_description(path, {ABOUT: np.array(texts[ABOUT])}, ABOUT, FORMAT)


def load_model(path: Path, name: str | None = None) -> tuple[Inception, dict[str, Any]]:
    """The model that a weights file describes, with its weights, in evaluation mode; and `about`.

    name   of the network: for a file of another project in which the names of the arrays do not tell it. The arrays
           are then taken by their order. `about` says what has been done under "source", and numbers the classes.

    No memory is taken for the model before its shapes have been found to be those of the arrays.
    Raises WeightsError naming the file and what does not fit.
    """
    arrays, about = load_weights(path)
    try:
        # Arrays may share the bytes of a file, in a model each has its own.
        allow(path, sum(4 * array.size for array in arrays.values()), path.stat().st_size, "its arrays", WeightsError)
        if not about:
            model, about = names.adopt(arrays, name)
            count = model.fc1.weight.shape[0]
            if len(about.get("classes", ())) != count:
                about["classes"] = [str(k) for k in range(count)]
            return _finished(model), about
        if name not in (None, about.get("model")):
            raise WeightsError(f"it holds {about.get('model')}, not {name}: leave out --model")
        if lacking := [key for key in _NEEDED if key not in about]:
            raise WeightsError(f"its description lacks {', '.join(lacking)}")
        if not isinstance(about["model"], str) or not isinstance(about["options"], dict):
            raise WeightsError("its description must have a name as model, and an object as options")
        with nn.outline():
            model = create_model(about["model"], **about["options"])
        model.load_state_dict(names.inward(model, arrays))
        check_classes(about["classes"], model.fc1.weight.shape[0])
        _check_size(model, about["size"])
    except (MinigradError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise WeightsError(f"{path}: {reason[:1000]}{'…' * (len(reason) > 1000)}") from None
    return _finished(model), about


def _finished(model: Inception) -> Inception:
    model.eval()
    return model


def _check_size(model: Inception, size: Any) -> None:
    """Raise WeightsError for pictures that no network of this kind is used with: one would take gigabytes."""
    most = min(_LARGEST, 16 * model.form.size.native)
    if isinstance(size, list) and any(isinstance(side, int) and side > most for side in size):
        raise WeightsError(f"it wants pictures of size {str(size)[:80]}; {model.form.name} takes at most {most} pixels "
                           "a side here")  # fmt: skip


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
            a run's directory       its finished weights, else its best, else those of its last checkpoint
            NAME                    without a suffix, of a model that comes with this package
            ADDRESS#sha256=DIGITS   http:// or https://, downloaded once and kept (`inception.download`); without
                                    the hash if it ends the file's name, as in torchvision's googlenet-1378be20.pth

    Raises WeightsError where no model has this name, or a directory has no weights; DownloadError if the file cannot
    be had.
    """
    if is_address(place):
        return fetch((Published.at(str(place)),), quiet=quiet)
    path = Path(place)
    if path.is_dir():
        if (found := of_run(path)) is None:
            raise WeightsError(f"{path}: a directory without weights (weights.npz, best.npz, checkpoint-….npz)")
        return found
    return path if path.suffix or path.exists() else shipped(str(place))


def of_run(directory: Path) -> Path | None:
    """The weights in the directory of a training run: finished, else best, else of the last checkpoint."""
    if not directory.is_dir():
        return None
    named = (directory / "weights.npz", directory / "best.npz")
    checkpoints = sorted(directory.glob("checkpoint-*.npz"), key=lambda path: (len(path.name), path.name))
    return next((path for path in (*named, *reversed(checkpoints)) if path.is_file()), None)


__all__ = [
    "ABOUT",
    "CHECKPOINT",
    "FORMAT",
    "WeightsError",
    "are_weights",
    "as_text",
    "check_classes",
    "check_suffix",
    "find_weights",
    "is_address",
    "is_shipped",
    "load_model",
    "load_weights",
    "of_run",
    "read_arrays",
    "save_weights",
    "shipped",
    "take_description",
    "write_arrays",
]
