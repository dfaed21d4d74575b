"""The data room: reading, drawing, splitting, augmenting and batching pictures."""

from __future__ import annotations

import gc
import math
import os
import pickle
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inception.data import (
    Augment,
    DataError,
    Dataset,
    Loader,
    load_cifar10,
    load_shapes,
    mean_and_std,
    normalise,
    split,
)
from minigrad.layout import pixels
from minigrad.random import Key, integers, permutation, uniform

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
    assert list(std) == [0.0] * 3
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
        with pytest.raises(DataError, match=f"{path.name} cannot be read"):
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


# ------------------------------------------------------------------------------------------------------- augment


def crop_and_flip_one(image: np.ndarray, key: Key, row: int, padding: int, mirrored: bool | None = None) -> np.ndarray:
    h, w, _ = image.shape
    dy, dx = integers(key.fold("crop"), 2 * padding + 1, (1, 2), rows=[row])[0] - padding
    if mirrored is None:
        mirrored = integers(key.fold("flip"), 2, 1, rows=[row])[0] == 1
    out = np.zeros_like(image)
    for i in range(h):
        for j in range(w):
            if 0 <= i + dy < h and 0 <= j + dx < w:
                out[i, w - 1 - j if mirrored else j] = image[i + dy, j + dx]
    return out


def some_images(n: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    return integers(Key(seed), 256, (n, h, w, 3)).astype(np.uint8)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 6), h=st.integers(1, 9), w=st.integers(1, 9), padding=st.integers(0, 4), seed=st.integers(0, 99)
)
def test_crop_and_flip_equal_the_loop_over_pictures(n, h, w, padding, seed):
    images = some_images(n, h, w, seed)
    before, rows, key = images.copy(), integers(Key(seed).fold("rows"), 50_000, n), Key(seed).fold("augment", 2)
    out = Augment(padding=padding)(images, rows, seed=seed, epoch=2)
    expected = [crop_and_flip_one(x, key, r, padding) for x, r in zip(images, rows, strict=True)]
    assert np.array_equal(out, np.stack(expected))
    expected = [crop_and_flip_one(x, key, r, padding, False) for x, r in zip(images, rows, strict=True)]
    assert np.array_equal(Augment(padding=padding, flip=False)(images, rows, seed=seed, epoch=2), np.stack(expected))
    assert np.array_equal(images, before)
    assert out.dtype == np.uint8
    assert out.flags.c_contiguous


def test_crop_and_flip_take_every_offset_equally_often():
    x = np.zeros((9000, 3, 3, 3), np.uint8)
    x[:, 1, 1] = 255
    out = Augment(padding=1)(x, np.arange(9000), seed=0, epoch=0)
    counts = (out[..., 0] == 255).sum(0)  # nine places for the bright pixel
    assert np.all(np.abs(counts - 1000) < 150)
    ramp = np.broadcast_to(np.arange(3, dtype=np.uint8)[None, None, :, None], x.shape)
    flipped = Augment(padding=0)(ramp, np.arange(9000), seed=0, epoch=0)[:, 0, 0, 0] == 2
    assert abs(flipped.mean() - 0.5) < 0.03


def test_alternate_flip_shows_both_sides_in_two_epochs():
    x, rows = some_images(400, 3, 5), np.arange(400) * 7
    epochs = [Augment(padding=0, flip="alternate")(x, rows, seed=1, epoch=e) for e in range(4)]
    mirrored = [np.all(e == x[:, :, ::-1], axis=(1, 2, 3)) for e in epochs]
    assert np.array_equal(mirrored[0], ~mirrored[1])
    assert np.array_equal(mirrored[0], mirrored[2])
    assert np.array_equal(mirrored[1], mirrored[3])
    assert all(np.array_equal(e[~m], x[~m]) for e, m in zip(epochs, mirrored, strict=True))
    assert 150 < mirrored[0].sum() < 250


@pytest.mark.parametrize("side", [1, 4, 5, 30])
def test_cutout_is_one_square_around_every_place_equally_often(side):
    x, n = np.full((6000, 9, 7, 3), 200, np.uint8), 6000
    out = Augment(padding=0, flip=False, cutout=side)(x, np.arange(n), seed=0, epoch=0, fill=(1.0, 2.0, 3.0))
    cut = out[..., 0] == 1
    assert np.all(out[cut] == [1, 2, 3])
    assert np.all(out[~cut] == 200)
    for picture in cut[:50]:
        i, j = np.nonzero(picture)
        assert picture[i.min() : i.max() + 1, j.min() : j.max() + 1].all()
        assert max(np.ptp(i), np.ptp(j)) < side
    if side == 1:
        assert np.all(np.abs(cut.sum(0) - n / 63) < 50)
    if side == 30:
        assert cut.all()


def jitter_one(image: np.ndarray, b: float, c: float, s: float) -> np.ndarray:
    """Brightness, contrast, saturation, one after the other, in float64."""
    weights = np.array([0.299, 0.587, 0.114])
    x = image * b
    x = c * x + (1 - c) * (x @ weights).mean()
    return (s * x + (1 - s) * (x @ weights)[..., None]).clip(0, 255)


@pytest.mark.parametrize("amount", [0.1, 0.4, 1.0])
def test_jitter_equals_its_three_steps(amount):
    x, rows = some_images(20, 6, 5), np.arange(20) + 100
    out = Augment(padding=0, flip=False, jitter=amount)(x, rows, seed=3, epoch=4)
    u = uniform(Key(3).fold("augment", 4, "jitter"), (20, 3), rows=rows)
    for i, factors in enumerate(1 + amount * (2 * u - 1)):
        assert np.all(np.abs(out[i] - jitter_one(x[i], *factors)) <= 0.5 + 1e-3)
    assert not np.array_equal(out, x)


def test_resized_crop_of_the_whole_is_nearly_the_picture():
    x = some_images(30, 8, 8)
    out = Augment(flip=False, resized_crop=(1.0, 1.0))(x, np.arange(30), seed=0, epoch=0)
    assert out.shape == x.shape  # an area of 1 in another shape than 1:1 loses a strip, so only the means agree
    assert abs(out.mean() - x.mean()) < 5


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 12), w=st.integers(1, 12), low=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_resized_crop_is_a_box_of_a_linear_picture(h, w, low, seed):
    """On a slope, linear interpolation is exact: the box can be read off, and must be within picture and shares."""
    slope = (np.arange(h)[:, None, None] * 8 + np.arange(w)[None, :, None] * 8 + np.zeros(3)).astype(np.uint8)
    images, rows = np.stack([slope] * 5), np.arange(5)
    out = Augment(flip=False, resized_crop=(low, 1.0))(images, rows, seed=seed, epoch=0)
    u = uniform(Key(seed).fold("augment", 0, "resized crop"), (5, 4), rows=rows)
    for y, (area, shape, top, left) in zip(out, u, strict=True):
        share, ratio = low + (1 - low) * area, (4 / 3) ** (2 * shape - 1)
        box_h, box_w = min(h, h * math.sqrt(share / ratio)), min(w, w * math.sqrt(share * ratio))
        i = (top * (h - box_h) + (np.arange(h) + 0.5) * box_h / h - 0.5).clip(0, h - 1)
        j = (left * (w - box_w) + (np.arange(w) + 0.5) * box_w / w - 0.5).clip(0, w - 1)
        assert np.all(np.abs(y[..., 0] - 8 * (i[:, None] + j)) <= 0.5 + 1e-3)


EVERYTHING = Augment(flip="alternate", cutout=3, jitter=0.4, resized_crop=(0.2, 1.0))


@pytest.mark.parametrize("augment", [Augment(), Augment(padding=2, flip="alternate", cutout=3, jitter=0.4), EVERYTHING])
def test_a_picture_is_augmented_alike_in_any_batch(augment):
    x, rows = some_images(12, 8, 9), np.arange(12) * 5
    together = augment(x, rows, seed=1, epoch=2, fill=(9, 9, 9))
    order = permutation(Key(0), 12)
    assert np.array_equal(augment(x[order], rows[order], seed=1, epoch=2, fill=(9, 9, 9)), together[order])
    for i in range(12):
        assert np.array_equal(augment(x[i : i + 1], rows[i : i + 1], seed=1, epoch=2, fill=(9, 9, 9))[0], together[i])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(augment(x, rows, **other, fill=(9, 9, 9)), together)
    assert augment(x[:0], rows[:0], seed=1, epoch=2).shape == (0, 8, 9, 3)
    assert np.array_equal(x, some_images(12, 8, 9))


def test_no_augmentation_at_all_is_the_picture_itself():
    x = some_images(5, 4, 4)
    assert np.array_equal(Augment(padding=0, flip=False)(x, np.arange(5), seed=0, epoch=0), x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"padding": -1},
        {"cutout": -2},
        {"flip": "sometimes"},
        {"jitter": -0.1},
        {"jitter": 1.5},
        {"jitter": math.nan},
        {"resized_crop": (0.0, 1.0)},
        {"resized_crop": (0.5, 0.2)},
        {"resized_crop": (0.5, 1.2)},
    ],
)
def test_augment_says_which_field_is_wrong(wrong):
    with pytest.raises(DataError, match=f"^augment: {next(iter(wrong))} must"):
        Augment(**wrong)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normalise(dtype):
    images = integers(Key(0), 256, (4, 5, 6, 3)).astype(np.uint8)
    mean, std = np.array([0.49, 0.48, 0.44]), np.array([0.25, 0.24, 0.26])
    y = normalise(images, mean, std, dtype)
    assert y.shape == (4, 3, 5, 6)
    assert y.dtype == dtype
    assert np.shares_memory(pixels(y), y)  # channels-last
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(y, expected, atol=20 * np.finfo(dtype).eps)


# -------------------------------------------------------------------------------------------------------- Loader


def some_loader(batch_size: int = 8, **options) -> Loader:
    return Loader(some_dataset(), batch_size, **({"mean": np.full(3, 0.5), "std": np.full(3, 0.25)} | options))


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (8, False, [8] * 6 + [2]),
        (8, True, [8] * 6),
        (10, True, [10] * 5),
        (64, False, [50]),
        (64, True, []),
    ],
)
def test_loader_cuts_an_epoch_into_batches(batch_size, drop_last, sizes):
    loader = some_loader(batch_size, drop_last=drop_last, shuffle=True)
    batches = list(loader.batches(0))
    assert [len(b.images) for b in batches] == sizes
    assert len(loader) == len(sizes)
    seen = [row for b in batches for row in b.rows]
    assert len(set(seen)) == len(seen) == sum(sizes)
    for b in batches:
        assert (b.images.dtype, b.labels.dtype, b.rows.dtype) == (np.float32, np.int64, np.int64)
        assert np.array_equal(b.labels, loader.dataset.labels[b.rows])
        expected = normalise(loader.dataset.images[b.rows], loader.mean, loader.std)
        assert np.array_equal(b.images, expected)


def test_loader_without_shuffle_keeps_the_order():
    assert [row for b in some_loader().batches(5) for row in b.rows] == list(range(50))


def test_loader_order_and_augmentation_are_functions_of_seed_and_epoch():
    options = {"shuffle": True, "augment": Augment(padding=2)}

    def epoch(number: int, seed: int = 0, batch_size: int = 8) -> list[np.ndarray]:
        """Every picture as the network sees it, by its place in the data set."""
        batches = list(some_loader(batch_size, seed=seed, **options).batches(number))
        images, rows = np.concatenate([b.images for b in batches]), np.concatenate([b.rows for b in batches])
        return [rows, images[np.argsort(rows)]]

    for a, b in zip(epoch(3), epoch(3), strict=True):
        assert np.array_equal(a, b)
    for other in (epoch(4), epoch(3, seed=1)):
        for a, b in zip(epoch(3), other, strict=True):
            assert not np.array_equal(a, b)
    # neither the batch's size nor the place in it matters to a picture
    assert np.array_equal(epoch(3)[1], epoch(3, batch_size=13)[1])
    unshuffled = some_loader(50, augment=Augment(padding=2)).batches(3)
    assert np.array_equal(epoch(3)[1], next(unshuffled).images)


@pytest.mark.parametrize("start", [0, 3, 6, 7, 9])
def test_loader_resumes_in_the_middle_of_an_epoch(start):
    loader = some_loader(shuffle=True, augment=Augment())
    whole, rest = list(loader.batches(2))[start:], list(loader.batches(2, start))
    assert len(whole) == len(rest)
    for a, b in zip(whole, rest, strict=True):
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x, y)


def test_loader_says_which_argument_is_wrong():
    for options, message in (
        ({"batch_size": 0}, "batch size"),
        ({"prefetch": -1}, "prefetch"),
        ({"std": np.array([0.2, 0.0, 0.2])}, "std"),
        ({"std": np.array([0.2, np.nan, 0.2])}, "std"),
    ):
        with pytest.raises(DataError, match=f"^some: .*{message}"):
            some_loader(**options)


# ------------------------------------------------------------------------------------------------------ prefetch


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("start", [0, 3, 6, 7])
@pytest.mark.parametrize("prefetch", [1, 4, 100])
def test_prefetch_changes_no_bit(prefetch, start):
    options = {"shuffle": True, "augment": EVERYTHING, "seed": 5}
    here = list(some_loader(**options).batches(2, start))
    ahead = list(some_loader(**options, prefetch=prefetch).batches(2, start))
    assert len(here) == len(ahead) == 7 - start
    for a, b in zip(here, ahead, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not loader_threads()


def test_prefetch_prepares_so_many_ahead_and_no_more(monkeypatch):
    loader, begun = some_loader(prefetch=2), []
    prepare = loader._batch
    monkeypatch.setattr(loader, "_batch", lambda rows, epoch: begun.append(rows[0] // 8) or prepare(rows, epoch))
    batches = loader.batches(0)
    assert not begun
    for i in range(3):
        next(batches)
        deadline = time.monotonic() + 5
        while len(begun) < i + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert begun == list(range(i + 3))
    batches.close()


@pytest.mark.parametrize("end", ["close", "drop", "exhaust", "error here", "throw"])
def test_prefetch_leaves_no_thread_behind(end):
    before = threading.active_count()
    batches = some_loader(prefetch=3).batches(0)
    next(batches)
    assert loader_threads()
    if end == "close":
        batches.close()
    elif end == "drop":
        del batches
        gc.collect()
    elif end == "exhaust":
        assert len(list(batches)) == 6
    elif end == "throw":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)
    else:

        def fails():
            for _ in some_loader(prefetch=3).batches(0):
                raise RuntimeError("of the one who reads")

        batches.close()
        with pytest.raises(RuntimeError):
            fails()
        gc.collect()
    assert not loader_threads()
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_in_place_of_its_batch(monkeypatch, prefetch):
    loader = some_loader(prefetch=prefetch)
    prepare = loader._batch

    def fails(rows, epoch):
        if rows[0] == 24:
            raise DataError("picture 24 is damaged")
        return prepare(rows, epoch)

    monkeypatch.setattr(loader, "_batch", fails)
    seen: list[int] = []
    with pytest.raises(DataError, match="picture 24"):
        seen.extend(batch.rows[0] for batch in loader.batches(0))
    assert seen == [0, 8, 16]
    assert not loader_threads()


def test_waited_is_what_the_reader_waited(monkeypatch):
    """Seven batches, 0.03 s each to prepare and 0.05 s each to use: prefetched, only the first keeps one waiting."""
    waited = []
    for prefetch in (0, 2):
        loader = some_loader(prefetch=prefetch)
        prepare = loader._batch
        monkeypatch.setattr(loader, "_batch", lambda *arguments, p=prepare: time.sleep(0.03) or p(*arguments))
        for _ in loader.batches(0):
            time.sleep(0.05)
        waited.append(loader.waited)
        next(loader.batches(1, start=6))
        assert loader.waited < waited[0] / 2  # of this epoch alone
    assert waited[0] > 7 * 0.03
    assert 0.03 < waited[1] < waited[0] / 2


def test_an_epoch_does_not_start_before_its_beginning():
    with pytest.raises(DataError, match="not at -1"):
        next(some_loader().batches(0, -1))
