"""Data sets in one .npz."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_augment import some_images

from inception.data import DataError, Dataset, Loader, load_arrays, load_shapes, mean_and_std, open_data
from minigrad.random import Key, integers


def arrays(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "x_train": some_images(6, 5, 4),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": some_images(3, 5, 4, seed=1),
        "y_test": np.array([2, 1, 0]),
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def npz(path: Path, **changes: Any) -> Path:
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays(**changes))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64, ">i2"])
def test_arrays_with_labels_of_any_integer_type(tmp_path: Path, dtype: Any) -> None:
    y = arrays()["y_train"].astype(dtype)
    train, test = open_data(npz(tmp_path / "a b.npz", y_train=y, y_test=np.array([[2], [1], [0]], dtype)))
    assert (train.name, test.name) == ("a b train", "a b test")
    assert train.classes == ("0", "1", "2")
    assert np.array_equal(train.images, arrays()["x_train"])
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1)])
def test_grey_arrays_get_three_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    grey = [integers(Key(i), 256, (n, *shape)).astype(np.uint8) for i, n in enumerate((6, 3))]
    train, test = load_arrays(
        npz(tmp_path / "a.npz", x_train=grey[0], x_test=grey[1], classes=np.array(["a", "b", "c"]))
    )
    assert train.classes == ("a", "b", "c")
    for dataset, pictures_ in zip((train, test), grey, strict=True):
        for channel in range(3):
            assert np.array_equal(dataset.images[..., channel], pictures_.reshape(-1, 5, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "holds no array x_train"),
        ({"y_test": None}, "holds no array y_test"),
        ({"x_train": some_images(6, 5, 4) / 255}, r"x_train must be uint8 .* got float64 \(6, 5, 4, 3\)"),
        ({"x_train": some_images(6, 5, 4).transpose(0, 3, 1, 2)}, r"x_train must be uint8 .* \(6, 3, 5, 4\)"),
        ({"x_test": np.uint8(3)}, r"x_test must be uint8 .* \(\)"),
        ({"x_test": some_images(0, 5, 4), "y_test": np.zeros(0, int)}, "x_test holds no pictures"),
        ({"x_test": some_images(3, 4, 5)}, r"x_train has pictures of \(5, 4\), x_test of \(4, 5\): all must"),
        ({"y_train": np.zeros(6)}, r"y_train must be integers of shape \(6,\).* got float64"),
        (
            {"x_train": np.zeros((6, 5, 4, 3))},
            r"x_train must be uint8 .*: bring them to 0 … 255 with \(x \* 255\)\.round\(\)\.astype\('uint8'\)",
        ),
        ({"x_train": np.zeros((6, 3, 5, 4), np.uint8)}, r"put the channels last with x\.transpose\(0, 2, 3, 1\)"),
        ({"y_train": np.eye(6)}, r"y_train must be .* \(6, 6\): of one-hot rows take y\.argmax\(axis=1\)"),
        ({"y_train": np.zeros(5, int)}, r"y_train must be integers of shape \(6,\).* \(5,\)"),
        ({"y_train": np.zeros((6, 10), int)}, r"y_train must be integers .* \(6, 10\)"),
        ({"y_train": np.int64(3)}, r"y_train must be integers .* \(\)"),
        ({"y_train": np.array([0, 1, 2, -1, 0, 0])}, "the label in row 3 is -1"),
        (
            {"y_test": np.array([0, 1, 10**12])},
            "a label is 1000000000000, but there are 9 pictures: number",
        ),
        ({"y_test": np.array([0, 1, 2]), "classes": np.array(["a", "b"])}, "row 2 is 2, but the 2 classes"),
        ({"classes": np.array([1, 2, 3])}, "classes must be strings"),
        ({"classes": np.array([["a", "b"]])}, "classes must be strings"),
        (
            {"classes": np.array(["a", None], object)},
            "no readable .npz of arrays .array classes holds Python objects, which",
        ),
        ({"x_train": np.array([None] * 6)}, "no readable .npz"),
    ],
)
def test_arrays_that_are_wrong_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = npz(tmp_path / "wrong.npz", **changes)
    with pytest.raises(DataError, match=message) as caught:
        open_data(path)
    assert "wrong" in str(caught.value)


@pytest.mark.parametrize(
    ("pixels", "remedy"),
    [
        (np.uint16([0, 65535]), "(x // 257).astype('uint8')"),
        (np.uint16([0, 255]), "x.astype('uint8')"),
        (np.uint16([0, 4095]), "(x * (255 / 4095)).round().astype('uint8')"),
        (np.int64([0, 200]), "x.astype('uint8')"),
        (np.float32([0, 1]), "(x * 255).round().astype('uint8')"),
        (np.float32([0, 254.6]), "x.round().astype('uint8')"),
    ],
)
def test_the_remedy_keeps_what_the_pictures_show(tmp_path: Path, pixels: np.ndarray, remedy: str) -> None:
    """The message's own code, run on these pixels: black stays black, and the brightest is at least 200 of 255."""
    x = np.broadcast_to(pixels[:, None, None, None], (2, 3, 3, 3)).copy()
    with pytest.raises(DataError) as caught:
        load_arrays(npz(tmp_path / "a.npz", x_train=x))
    assert str(caught.value).endswith(remedy)
    result = eval(remedy, {"x": x})
    assert result.dtype == np.uint8
    assert (result[0] == 0).all()
    assert (result[1] >= 200).all()


def test_black_pictures_and_a_constant_channel_are_data_too(tmp_path: Path) -> None:
    """10,000 black pictures, of which compression leaves a thousandth; and normalised, a constant channel is 0."""
    black = np.zeros((10_000, 32, 32, 3), np.uint8)
    path = npz(
        tmp_path / "a.npz", x_train=black, y_train=np.arange(10_000) % 2, x_test=black[:10], y_test=np.arange(10) % 2
    )
    assert path.stat().st_size < 100_000
    assert len(load_arrays(path)[0]) == 10_000
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 0, 200
    data = Dataset(pixels, np.arange(64) % 2, ("a", "b"), "one colour")
    mean, std = mean_and_std(data)
    (batch,) = Loader(data, 64, mean=mean, std=std).batches(0)
    assert np.abs(batch.images[:, 0]).max() == 0
    assert np.abs(batch.images[:, 2]).max() < 1e-6
    assert np.std(batch.images[:, 1]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("number", [0, 2.5, "8", None])
def test_a_batch_size_is_a_whole_number(number: Any) -> None:
    data = load_shapes(20, 0)[0]
    half = np.full(3, 0.5)
    with pytest.raises(DataError, match="the batch size must be a whole number, at least 1, got"):
        Loader(data, number, mean=half, std=half)
    assert len(Loader(data, np.int64(8), mean=half, std=half)) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", pickle.dumps({"x_train": 1}), b"\x93NUMPY\x01\x00"])
def test_files_that_only_end_in_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is no readable \.npz"):
        open_data(tmp_path / "a.npz")
