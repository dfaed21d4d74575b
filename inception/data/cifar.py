"""CIFAR-10 from the files its authors publish: 50,000 training and 10,000 test pictures of 32×32, ten classes.

    https://www.cs.toronto.edu/~kriz/cifar.html    (Krizhevsky: Learning multiple layers of features, 2009)

Either archive will do. The "python version" holds pickles, and a pickle is a program: it may name any function
of any module and call it. `_Unpickler` looks nothing up. It admits the few names that describe an array, hands
back stand-ins that keep what they are given, and refuses every other name; the array is then built here, if
the description is that of uint8 pixels with as many bytes as they need.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from inception.data.dataset import DataError, Dataset

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_CLASSES = 10
_PIXELS = 3 * 32 * 32  # bytes of a picture: its red plane, its green, its blue
_AGAIN = "unpack the CIFAR-10 archive again, or download it again"


def load_cifar10(directory: str | Path) -> tuple[Dataset, Dataset]:
    """Read (train, test), images (N, 32, 32, 3), from the directory that holds the batch files, or its parent.

    Raises DataError, naming the file and where there is one the row, if a file is missing, damaged or hostile.
    """
    folder, suffix = _find(Path(directory))
    if suffix:
        classes = _class_names(folder / "batches.meta.txt", _read(folder / "batches.meta.txt").split())
        batches = [_binary_batch(folder / (name + suffix)) for name in _BATCHES]
    else:
        meta = _unpickle(folder / "batches.meta")
        classes = _class_names(folder / "batches.meta", meta.get(b"label_names"))
        batches = [_python_batch(folder / name) for name in _BATCHES]
    return _join(batches[:-1], classes, "CIFAR-10 train"), _join(batches[-1:], classes, "CIFAR-10 test")


def _find(directory: Path) -> tuple[Path, str]:
    """The folder with the batch files and their suffix. One file is enough: `_read` names those missing."""
    for folder in (directory / name for name in _FOLDERS):
        for suffix in ("", ".bin"):
            if any((folder / (name + suffix)).is_file() for name in _BATCHES):
                return folder, suffix
    raise DataError(
        f"{directory} holds no CIFAR-10 batches (data_batch_1 … or data_batch_1.bin …): "
        f"name the folder into which the archive was unpacked"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {_AGAIN}") from error


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) != _CLASSES or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path} does not hold the names of {_CLASSES} classes: {_AGAIN}")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _join(batches: list[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], name: str) -> Dataset:
    labels = np.concatenate([labels for labels, _ in batches])
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    start = 0
    for _, planes in batches:  # (rows, 3072): the file keeps planes, a `Dataset` pixels
        images[start : start + len(planes)] = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        start += len(planes)
    return Dataset(images, labels, classes, name)


def _binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (rows,) and planes (rows, 3072): a row is one byte of label and its planes."""
    content = np.frombuffer(_read(path), np.uint8)
    rows, rest = divmod(content.size, 1 + _PIXELS)
    if rest or not rows:
        raise DataError(f"{path} ends within row {rows}, {rest} bytes into its {1 + _PIXELS}: {_AGAIN}")
    records = content.reshape(rows, 1 + _PIXELS)
    labels = records[:, 0]
    wrong = np.flatnonzero(labels >= _CLASSES)
    if wrong.size:
        raise DataError(
            f"{path}: the label in row {wrong[0]} is {labels[wrong[0]]}, outside 0 to {_CLASSES - 1}: {_AGAIN}"
        )
    return labels.astype(np.int64), records[:, 1:]


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (rows,) and planes (rows, 3072), from a pickled dict of b"labels" and b"data"."""
    batch = _unpickle(path)
    planes, labels = _uint8_array(path, batch.get(b"data")), batch.get(b"labels")
    if planes.ndim != 2 or planes.shape[1] != _PIXELS or not len(planes):
        raise DataError(f"{path}: the pixels have the shape {planes.shape} instead of (rows, {_PIXELS}): {_AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(planes):
        count = len(labels) if isinstance(labels, list) else "no"
        raise DataError(f"{path} holds {count} labels for {len(planes)} pictures: {_AGAIN}")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < _CLASSES:
            raise DataError(f"{path}: the label in row {row} is not an integer from 0 to {_CLASSES - 1}: {_AGAIN}")
    return np.array(labels, np.int64), planes


class _Part:
    """Stands in for numpy's array or dtype, or what makes one: keeps what the pickle says of it, does nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# The unpickler written in Python is as fast here, and unlike the one in C its memory is bounded by the file:
# nine bytes of pickle can make that one allocate gigabytes for its table of references.
class _Unpickler(pickle._Unpickler):
    """Builds ints, bytes, lists, tuples, dicts and `_Part`s. Nothing that the file names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),  # since NumPy 2
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return _Part
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path) -> dict[Any, Any]:
    content = io.BytesIO(_read(path))
    try:
        value = _Unpickler(content, encoding="bytes").load()  # "bytes": Python 2 wrote the published files
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} is no CIFAR-10 batch ({type(error).__name__}: {error}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is no CIFAR-10 batch (it holds no dict): {_AGAIN}")
    return value


def _uint8_array(path: Path, described: Any) -> np.ndarray:
    """The array described by the state that numpy.ndarray pickles: (version, shape, dtype, is Fortran, bytes)."""
    match getattr(described, "state", None):
        case (_, tuple(shape), _Part(arguments=("u1" | b"u1", *_)), bool(fortran), bytes(content)):
            # math.prod of hostile sizes is a large int, never an allocation
            if all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) == len(content):
                return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise DataError(f"{path}: the pixels are no complete array of uint8: {_AGAIN}")
