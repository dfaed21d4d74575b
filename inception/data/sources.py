"""Where data sets come from: every source by the name a user gives it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from inception.data.cifar import CIFAR10, CIFAR100, holds_cifar10, holds_cifar100, load_cifar10, load_cifar100
from inception.data.dataset import DataError, Dataset, labels_remedy, pictures_remedy
from inception.data.pictures import load_folders
from inception.data.shapes import load_shapes
from inception.download import fetch
from minigrad.errors import did_you_mean

_MAY_STAND = (
    "may be shapes, cifar10, cifar100, a directory with the batches of CIFAR-10 or CIFAR-100, a directory with "
    "train/CLASS/PICTURE and test/CLASS/PICTURE, or a file .npz with x_train, y_train, x_test and y_test"
)


def open_data(source: str | Path, *, size: int = 224, quiet: bool = False) -> tuple[Dataset, Dataset]:
    """The data set (train, test) that `source` names.

    source  "shapes"                drawn by this project
            "cifar10", "cifar100"   downloaded once and kept in a cache (`inception.download.fetch`)
            DIR                     with CIFAR's batches, in the python or the binary version (./cifar10 is a DIR)
            DIR                     with train/CLASS/PICTURE and test/ (or val/) likewise (`load_folders`)
            FILE.npz                with arrays (`load_arrays`)
    size    pixels on a side to which the pictures of folders are brought; the other sources have their own
    quiet   no progress bar

    Raises DataError if it is none of these, or for what is wrong in it; DownloadError if it cannot be had.
    """
    match str(source):
        case "shapes":
            return load_shapes()
        case "cifar10":
            return load_cifar10(fetch(CIFAR10, quiet=quiet))
        case "cifar100":
            return load_cifar100(fetch(CIFAR100, quiet=quiet))
    path = Path(source)
    if path.is_dir():
        if holds_cifar10(path):
            return load_cifar10(path)
        if holds_cifar100(path):
            return load_cifar100(path)
        if (path / "train").is_dir():
            return load_folders(path, (size, size))
        raise DataError(f"the directory {path} holds no data set that is known here: it {_MAY_STAND}")
    if path.suffix == ".npz":
        return load_arrays(path)
    nothing = "" if path.exists() else ", and no file or directory"
    near = nothing and did_you_mean(source, ("shapes", "cifar10", "cifar100"))
    raise DataError(f"{str(source)!r} is no data set{nothing}{near + ' It' if near else ': it'} {_MAY_STAND}")


def load_arrays(path: str | Path) -> tuple[Dataset, Dataset]:
    """(train, test) from an .npz, as `np.savez(path, x_train=…, y_train=…, x_test=…, y_test=…)` writes it.

    x_…      (N, H, W, 3), or (N, H, W) of grey, which is put into all three channels; uint8
    y_…      (N,) or (N, 1) of any integer type
    classes  (optional) their names, strings; without it they are called by their numbers

    Nothing in the file is unpickled. Raises DataError, naming file and array, if one is missing or not as it should be.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{path} is no readable .npz: np.savez(path, x_train=…, …) writes one")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files if name in (*_ARRAYS, "classes")}
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        reason = "it holds Python objects, which are never read" if "Object arrays" in str(error) else f"{error!r:.200}"
        raise DataError(f"{path} is no readable .npz of arrays ({reason})") from None
    for name in _ARRAYS:
        if name not in arrays:
            raise DataError(f"{path} holds no array {name}: it needs {', '.join(_ARRAYS)}")
    images = {part: _images(f"{path}: x_{part}", arrays[f"x_{part}"]) for part in ("train", "test")}
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise DataError(
            f"{path}: x_train has pictures of {images['train'].shape[1:3]}, x_test of {images['test'].shape[1:3]}: "
            "all must have one size"
        )
    labels = {part: _labels(f"{path}: y_{part}", arrays[f"y_{part}"], len(images[part])) for part in ("train", "test")}
    classes = _classes(path, arrays.get("classes"), np.concatenate([labels["train"], labels["test"]]))
    train, test = (Dataset(images[part], labels[part], classes, f"{path.stem} {part}") for part in ("train", "test"))
    return train, test


_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def _images(name: str, x: np.ndarray) -> np.ndarray:
    grey = x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 1)
    if x.dtype != np.uint8 or not (grey or (x.ndim == 4 and x.shape[3] == 3)):
        got = f"{x.dtype} {x.shape}{pictures_remedy(x)}"
        raise DataError(f"{name} must be uint8 of shape (N, H, W, 3) or (N, H, W), got {got}")
    if not x.size:
        raise DataError(f"{name} holds no pictures, its shape is {x.shape}")
    return np.repeat(x.reshape(*x.shape[:3], 1), 3, axis=3) if grey else np.ascontiguousarray(x)


def _labels(name: str, y: np.ndarray, n: int) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape not in ((n,), (n, 1)):
        got = f"{y.dtype} {y.shape}{labels_remedy(y)}"
        raise DataError(f"{name} must be integers of shape ({n},), one for each picture, got {got}")
    y = y.ravel()
    wrong = (y < 0) | (y > np.iinfo(np.int64).max)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{name} must number the classes from 0, the label in row {row} is {y[row]}")
    return y.astype(np.int64)


def _classes(path: Path, names: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise DataError(f"{path}: classes must be strings of shape (K,), got {names.dtype} {names.shape}")
        return tuple(names.tolist())
    if labels.max() >= len(labels):  # a damaged label must not ask for a million names
        raise DataError(
            f"{path}: a label is {labels.max()}, but there are {len(labels)} pictures: number the classes from 0, or "
            "name them in an array classes"
        )
    return tuple(map(str, range(labels.max() + 1)))
