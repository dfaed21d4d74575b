"""Data sets as arrays in one .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inception.data.dataset import DataError, Dataset, labels_remedy, pictures_remedy
from inception.files import allow
from inception.npz import read_arrays

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_NAME = 64  # bytes of a class's name as Python keeps it, besides its letters


def load_arrays(path: str | Path) -> tuple[Dataset, Dataset]:
    """(train, test) from an .npz, as `np.savez(path, x_train=…, y_train=…, x_test=…, y_test=…)` writes it.

    x_…      (N, H, W, 3), or (N, H, W) of grey, which is put into all three channels; uint8
    y_…      (N,) or (N, 1) of any integer type
    classes  (optional) their names, strings; without it they are called by their numbers

    Nothing in the file is unpickled. Raises DataError, naming file and array, if one is missing or not as it should be.
    """
    path = Path(path)
    arrays, size = read_arrays(path, (*_ARRAYS, "classes"), DataError)
    for name in _ARRAYS:
        if name not in arrays:
            raise DataError(f"{path} holds no array {name}: it needs {', '.join(_ARRAYS)}")
    widened = sum(_widened(name, array) for name, array in arrays.items())
    allow(path, widened, size, "the data set", DataError, "write it uncompressed, with np.savez")
    images = {part: _images(f"{path}: x_{part}", arrays[f"x_{part}"]) for part in ("train", "test")}
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise DataError(
            f"{path}: x_train has pictures of {images['train'].shape[1:3]}, x_test of {images['test'].shape[1:3]}: "
            "all must have one size"
        )
    labels = {part: _labels(f"{path}: y_{part}", arrays[f"y_{part}"], len(images[part])) for part in ("train", "test")}
    classes = _classes(path, arrays.get("classes"), labels)
    train, test = (Dataset(images[part], labels[part], classes, f"{path.stem} {part}") for part in ("train", "test"))
    return train, test


def _widened(name: str, array: np.ndarray) -> int:
    """Bytes that an array takes on its way to a `Dataset`: grey gets three channels, labels eight bytes."""
    if name == "classes":
        return array.nbytes + array.size * _NAME
    if name.startswith("y_"):
        return array.nbytes + array.size * 8
    return array.nbytes + (3 * array.size if array.shape[3:] != (3,) else 0)


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


def _classes(path: Path, names: np.ndarray | None, labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1:
            raise DataError(f"{path}: classes must be strings of shape (K,), got {names.dtype} {names.shape}")
        return tuple(names.tolist())
    largest, pictures = max(y.max() for y in labels.values()), sum(map(len, labels.values()))
    if largest >= pictures:  # a damaged label must not ask for a million names
        raise DataError(
            f"{path}: a label is {largest}, but there are {pictures} pictures: number the classes from 0, or "
            "name them in an array classes"
        )
    return tuple(map(str, range(largest + 1)))
