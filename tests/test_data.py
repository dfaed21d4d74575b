"""The data room: data sets and what can be asked of them, CIFAR-10 on disk, drawn shapes."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inception.data import (
    DataError,
    Dataset,
    load_cifar10,
    load_shapes,
    mean_and_std,
    normalise,
    split,
)
from minigrad.random import Key, integers

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ROWS = 7


def some_dataset(n: int = 50, size: int = 8, classes: int = 10) -> Dataset:
    images = integers(Key(1), 256, (n, size, size, 3)).astype(np.uint8)
    return Dataset(images, integers(Key(2), classes, n), tuple(NAMES[:classes]), "some")


# ------------------------------------------------------------------------------------------------------- Dataset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((3, 4, 4, 3), np.float32)}, "images must be uint8"),
        ({"images": np.zeros((3, 3, 4, 4), np.uint8)}, r"\(N, H, W, 3\)"),
        ({"images": np.zeros((3, 4, 3), np.uint8)}, r"\(N, H, W, 3\)"),
        ({"labels": np.zeros(3, np.int32)}, "labels must be int64"),
        ({"labels": np.zeros(2, np.int64)}, r"of shape \(3,\)"),
        ({"labels": np.zeros((3, 1), np.int64)}, r"of shape \(3,\)"),
        ({"images": np.zeros((3, 3, 4, 4), np.uint8)}, r"channels last with x\.transpose\(0, 2, 3, 1\)"),
        ({"images": [[1]]}, "images must be an array, got list: use numpy.array"),
        ({"labels": [0, 1, 1]}, "labels must be an array, got list: use numpy.array"),
        ({"labels": np.zeros(3)}, r"got float64 \(3,\): convert with y\.astype\('int64'\)"),
        ({"labels": np.eye(3, dtype=np.int64)}, r"of one-hot rows take y\.argmax\(axis=1\)"),
        ({"labels": np.array([0, 1, 2])}, "row 2 is 2"),
        ({"labels": np.array([0, -1, 1])}, "row 1 is -1"),
    ],
)
def test_dataset_says_what_does_not_fit(change, message):
    good = {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.zeros(3, np.int64), "classes": ("a", "b")}
    assert len(Dataset(**good, name="tiny")) == 3
    with pytest.raises(DataError, match=f"^tiny: .*{message}"):
        Dataset(**(good | change), name="tiny")


@given(n=st.integers(2, 60), fraction=st.floats(0, 1), seed=st.integers(0, 9))
def test_split_puts_every_picture_on_one_side(n, fraction, seed):
    numbered = Dataset(np.zeros((n, 1, 1, 3), np.uint8), np.arange(n), tuple("c" * n), "numbered")
    if not 0 < round(n * fraction) < n:
        with pytest.raises(DataError, match="both sides"):
            split(numbered, fraction, seed)
        return
    train, validation = split(numbered, fraction, seed)
    assert len(validation) == round(n * fraction)
    assert sorted([*train.labels, *validation.labels]) == list(range(n))
    assert np.array_equal(validation.labels, split(numbered, fraction, seed)[1].labels)


def test_split_keeps_picture_and_label_together_and_follows_the_seed():
    dataset = some_dataset()
    rows = {image.tobytes(): label for image, label in zip(dataset.images, dataset.labels, strict=True)}
    for part in split(dataset, 0.2, seed=3):
        assert [rows[image.tobytes()] for image in part.images] == list(part.labels)
    assert not np.array_equal(split(dataset, 0.2, 3)[1].images, split(dataset, 0.2, 4)[1].images)


def test_mean_and_std_are_exact():
    dataset = some_dataset(n=2100, size=3)  # more than two blocks
    mean, std = mean_and_std(dataset)
    scaled = dataset.images.astype(np.longdouble) / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)).astype(float), rtol=1e-15)
    np.testing.assert_allclose(std, scaled.std((0, 1, 2)).astype(float), rtol=1e-15)
    assert mean.dtype == std.dtype == np.float64


def test_mean_and_std_of_one_colour_and_of_nothing():
    grey = Dataset(np.full((9, 5, 5, 3), 77, np.uint8), np.zeros(9, np.int64), ("grey",), "grey")
    mean, std = mean_and_std(grey)
    assert list(mean) == [77 / 255] * 3
    assert list(std) == [1.0] * 3  # so that normalising gives 0
    assert np.abs(normalise(grey.images, mean, std)).max() < 1e-7
    with pytest.raises(DataError, match="no pictures"):
        mean_and_std(Dataset(np.empty((0, 5, 5, 3), np.uint8), np.empty(0, np.int64), ("a",), "empty"))


# ------------------------------------------------------------------------------------------------------ CIFAR-10


def planes_and_labels(i: int) -> tuple[np.ndarray, list[int]]:
    """The contents of batch file i: (rows, 3072) uint8 and labels."""
    planes = integers(Key(i), 256, (ROWS, 3072)).astype(np.uint8)
    return planes, [int(label) for label in integers(Key(i).fold("labels"), 10, ROWS)]


def python_2_pickle(planes: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and the NumPy of 2009 wrote it: byte strings throughout, protocol 2."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(planes.shape[0]) + number(planes.shape[1]) + b"\x86"
    state = b"(" + number(1) + shape + dtype + b"\x89" + text(planes.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + state + text(b"labels") + listed + b"u."


def write_python(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(BATCHES):
        (folder / name).write_bytes(python_2_pickle(*planes_and_labels(i)))
    meta = {b"label_names": [name.encode() for name in NAMES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(BATCHES):
        planes, labels = planes_and_labels(i)
        rows = [bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(rows))
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


@pytest.mark.parametrize("write", [write_python, write_binary])
@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py", "cifar-10-batches-bin"])
def test_cifar_in_both_formats(tmp_path, write, subfolder):
    write(tmp_path / subfolder)
    train, test = load_cifar10(str(tmp_path))
    assert (len(train), len(test)) == (5 * ROWS, ROWS)
    assert train.classes == test.classes == tuple(NAMES)
    for dataset, first in ((train, 0), (test, 5)):
        for n in range(len(dataset)):
            planes, labels = planes_and_labels(first + n // ROWS)
            assert dataset.labels[n] == labels[n % ROWS]
            plane = planes[n % ROWS]
            for channel, i, j in ((0, 0, 0), (1, 0, 31), (2, 17, 5)):  # red, green, blue planes, each row by row
                assert dataset.images[n, i, j, channel] == plane[channel * 1024 + i * 32 + j]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_batches_written_by_todays_python(tmp_path, protocol, order):
    expected, _ = load_cifar10(write_python(tmp_path))
    planes, labels = planes_and_labels(0)
    batch = {b"data": np.asarray(planes, order=order), b"labels": labels}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=protocol))
    assert np.array_equal(load_cifar10(tmp_path)[0].images, expected.images)


@pytest.mark.parametrize("write", [write_python, write_binary])
def test_cifar_names_the_missing_file(tmp_path, write):
    folder = write(tmp_path)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} is missing: unpack the archive again"):
            load_cifar10(folder)
        path.write_bytes(content)


def test_cifar_in_an_empty_or_missing_directory(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="holds no CIFAR-10 batches"):
            load_cifar10(directory)


class Call:
    """Pickled, it is the order to call `function`."""

    def __init__(self, function, *arguments):
        self.order = function, arguments

    def __reduce__(self):
        return self.order


def refused(folder: Path, content: bytes, message: str, name: str = "data_batch_2") -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load_cifar10(folder)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar_runs_nothing_that_a_pickle_asks_for(tmp_path, protocol, name):
    folder, sentinel = write_python(tmp_path / "batches"), tmp_path / "executed"
    planes, labels = planes_and_labels(0)
    for order in (
        Call(os.system, f"touch {sentinel}"),
        Call(eval, f"open({str(sentinel)!r}, 'w')"),
        Call(open, str(sentinel), "w"),
        Call(getattr, os, "system"),
        Call(np.frombuffer, b"abc"),
    ):
        for batch in (order, {b"data": planes, b"labels": labels, b"extra": order}):
            try:
                content = pickle.dumps(batch, protocol=protocol)
            except (TypeError, pickle.PicklingError):  # a module as argument: no such pickle
                continue
            refused(folder, content, "asks for", name)
    assert not sentinel.exists()


def test_cifar_runs_nothing_by_the_back_doors_either(tmp_path):
    folder, sentinel = write_python(tmp_path / "batches"), tmp_path / "executed"
    touch = f"touch {sentinel}".encode()
    for content in (
        b"(S'" + touch + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + touch + b"'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93S'" + touch + b"'\n\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__class__\x93.",  # a dotted name
        b"\x80\x02cnumpy\ndtype\n}S'__setstate__'\ncos\nsystem\nsb.",  # BUILD on a class
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pid\n.",  # PERSID
    ):
        refused(folder, content, "is no CIFAR batch")
    assert not sentinel.exists()


def test_a_hostile_pickle_changes_nothing_for_the_next_one(tmp_path):
    folder = write_python(tmp_path)
    good = (folder / "data_batch_2").read_bytes()
    # BUILD with a pair sets attributes: here on whatever stands for _codecs.encode, numpy.dtype and a made array
    for target in (b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy\ndtype\n)R"):
        refused(folder, b"\x80\x02" + target + b"N}S'__defaults__'\nN(I1\nI2\ntsS'arguments'\nI3\ns\x86b.", "")
    (folder / "data_batch_2").write_bytes(good)
    load_cifar10(folder)


def test_cifar_memory_is_bounded_by_the_file(tmp_path):
    folder = write_python(tmp_path)
    refused(folder, b"\x80\x02Nr\xff\xff\xff\x7f0.", "no CIFAR batch")  # LONG_BINPUT: two thousand million references
    refused(folder, b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"abc.", "no CIFAR batch")  # BINBYTES8
    planes, labels = planes_and_labels(0)
    huge = python_2_pickle(planes, labels).replace(struct.pack("<ib", 3072, -122), struct.pack("<ib", 1 << 30, -122))
    refused(folder, huge, "no complete array of uint8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((ROWS, 3072), np.float32), "no complete array of uint8"),
        (np.zeros((ROWS, 3072), np.int8), "no complete array of uint8"),
        (np.full((ROWS, 3072), None), "no complete array of uint8"),
        (np.zeros((ROWS, 3072), [("a", "u1")]), "no complete array of uint8"),
        (np.zeros((ROWS, 3072), np.uint8).tobytes(), "no complete array of uint8"),
        (None, "no complete array of uint8"),
        (np.zeros((ROWS, 3071), np.uint8), r"shape \(7, 3071\)"),
        (np.zeros((ROWS, 3, 32, 32), np.uint8), r"shape \(7, 3, 32, 32\)"),
        (np.zeros(3072, np.uint8), r"shape \(3072,\)"),
        (np.zeros((0, 3072), np.uint8), r"shape \(0, 3072\)"),
        (np.zeros((ROWS - 1, 3072), np.uint8), "holds 7 labels for 6 pictures"),
    ],
)
def test_cifar_pixels_of_the_wrong_kind(tmp_path, data, message):
    refused(write_python(tmp_path), pickle.dumps({b"data": data, b"labels": [0] * ROWS}, protocol=4), message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 10, 3, 4, 5], "row 3 is not an integer from 0 to 9"),
        ([0, 1, 2, 3, 4, 5, -1], "row 6"),
        ([0, True, 2, 3, 4, 5, 6], "row 1"),
        ([0, 1, 2.0, 3, 4, 5, 6], "row 2"),
        ([b"cat"] * ROWS, "row 0"),
        ([1 << 100] * ROWS, "row 0"),
        ([0] * (ROWS + 1), "holds 8 labels for 7 pictures"),
        ((0,) * ROWS, "holds no labels"),
        (None, "holds no labels"),
    ],
)
def test_cifar_labels_of_the_wrong_kind(tmp_path, labels, message):
    batch = {b"data": planes_and_labels(0)[0], b"labels": labels}
    refused(write_python(tmp_path), pickle.dumps(batch, protocol=2), message)


@pytest.mark.parametrize("names", [None, [], [b"cat"] * 9, ["cat"] * 10, b"cat" * 10])
def test_cifar_class_names_of_the_wrong_kind(tmp_path, names):
    content = pickle.dumps({b"label_names": names}, protocol=4)
    refused(write_python(tmp_path), content, "names of 10 classes", "batches.meta")


def test_cifar_pickles_that_are_something_else(tmp_path):
    folder = write_python(tmp_path)
    refused(folder, pickle.dumps([1, 2, 3]), "holds no dict")
    for content in (b"", b"<html>404 Not Found</html>", b"\x1f\x8b\x08\x00", bytes(1000)):
        refused(folder, content, "no CIFAR batch")


def test_cifar_python_batch_cut_anywhere(tmp_path):
    folder = write_python(tmp_path)
    content = (folder / "data_batch_2").read_bytes()
    for end in [*range(0, 200, 7), *range(200, len(content), 1511), *range(len(content) - 60, len(content))]:
        refused(folder, content[:end], "")


def test_cifar_binary_batch_cut_anywhere(tmp_path):
    folder = write_binary(tmp_path)
    content = (folder / "data_batch_2.bin").read_bytes()
    for end in [0, 1, 3072, *range(5000, len(content), 1511), len(content) - 1]:
        refused(folder, content[:end], f"ends within row {end // 3073}", "data_batch_2.bin")


def test_cifar_binary_label_out_of_range(tmp_path):
    folder = write_binary(tmp_path)
    content = bytearray((folder / "test_batch.bin").read_bytes())
    content[4 * 3073] = 10
    refused(folder, bytes(content), "label in row 4 is 10", "test_batch.bin")


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_cifar_damaged_pickles_raise_nothing_but_data_errors(tmp_path_factory, position, value):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        write_python(folder)
    content = bytearray(python_2_pickle(*planes_and_labels(1)))
    outside = [*range(300), *range(len(content) - 80, len(content))]  # the rest are pixels: any value will do
    content[outside[int(position * len(outside))]] = value
    (folder / "data_batch_2").write_bytes(content)
    try:
        load_cifar10(folder)
    except DataError as error:
        message = str(error)
    else:
        return  # the byte did not matter
    assert "data_batch_2" in message


# -------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_balanced_and_repeatable():
    train, test = load_shapes(train=230, test=40, seed=3)
    assert train.images.shape == (230, 32, 32, 3)
    assert train.images.dtype == np.uint8
    assert list(np.bincount(train.labels)) == [23] * 10
    assert list(np.bincount(test.labels)) == [4] * 10
    assert len(set(train.classes)) == 10
    again, _ = load_shapes(train=150, test=0, seed=3)
    assert np.array_equal(again.images, train.images[:150])  # picture i does not depend on how many there are
    other, _ = load_shapes(train=40, test=0, seed=4)
    assert not np.any(np.all(other.images == train.images[:40], axis=(1, 2, 3)))
    assert not np.any(np.all(test.images == train.images[:40], axis=(1, 2, 3)))


def test_shapes_say_nothing_by_their_mean_colour():
    train, _ = load_shapes(train=2000, test=0)
    means = train.images.reshape(-1, 32 * 32, 3).mean(1)
    by_class = np.stack([means[train.labels == c].mean(0) for c in range(10)])
    assert np.all(np.abs(by_class - 127.5) < 16)  # 50 levels of spread over 200 pictures: 4 levels of chance


def test_a_linear_classifier_fails_on_shapes():
    """Softmax regression on standardised pixels: it learns its training set by heart and is lost on the test set."""
    train, test = load_shapes(train=5000, test=1000)
    mean, std = mean_and_std(train)
    x, x_test = (normalise(d.images, mean, std).reshape(len(d), -1) for d in (train, test))
    weight, bias = np.zeros((3072, 10), np.float32), np.zeros(10, np.float32)
    targets = np.eye(10, dtype=np.float32)[train.labels]
    velocity = np.zeros_like(weight)
    best = 0.0
    for step in range(200):
        rows = integers(Key(0).fold(step), len(x), 500)
        logits = x[rows] @ weight + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        d = (p / p.sum(1, keepdims=True) - targets[rows]) / len(rows)
        velocity = 0.9 * velocity - 5e-3 * (x[rows].T @ d)
        weight += velocity
        bias -= 3e-2 * d.sum(0)
        if step % 25 == 24:
            best = max(best, np.mean((x_test @ weight + bias).argmax(1) == test.labels))
    learnt = np.mean((x @ weight + bias).argmax(1) == train.labels)
    print(f"\nlinear classifier on shapes: {learnt:.1%} train, {best:.1%} test at best")
    assert learnt > 0.3
    assert best < 0.5
