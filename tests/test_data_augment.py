"""Augmentation: each step against a plain loop, and nothing that depends on the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inception.data import (
    Augment,
    DataError,
    normalise,
)
from minigrad.layout import pixels
from minigrad.random import Key, integers, permutation, uniform


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
    assert np.array_equal(Augment(padding=padding, flip="no")(images, rows, seed=seed, epoch=2), np.stack(expected))
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
    out = Augment(padding=0, flip="no", cutout=side)(x, np.arange(n), seed=0, epoch=0, fill=(1.0, 2.0, 3.0))
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
    out = Augment(padding=0, flip="no", jitter=amount)(x, rows, seed=3, epoch=4)
    u = uniform(Key(3).fold("augment", 4, "jitter"), (20, 3), rows=rows)
    for i, factors in enumerate(1 + amount * (2 * u - 1)):
        assert np.all(np.abs(out[i] - jitter_one(x[i], *factors)) <= 0.5 + 1e-3)
    assert not np.array_equal(out, x)


def test_resized_crop_of_the_whole_is_the_picture():
    """A box of another shape would not fit: it would lose a strip, and be less than the whole."""
    x = some_images(30, 8, 8)
    out = Augment(flip="no", resized_crop=(1.0, 1.0))(x, np.arange(30), seed=0, epoch=0)
    np.testing.assert_array_equal(out, x)


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 12), w=st.integers(1, 12), low=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_resized_crop_is_a_box_of_a_linear_picture(h, w, low, seed):
    """On a slope, linear interpolation is exact: the box can be read off, and must be within picture and shares."""
    slope = (np.arange(h)[:, None, None] * 8 + np.arange(w)[None, :, None] * 8 + np.zeros(3)).astype(np.uint8)
    images, rows = np.stack([slope] * 5), np.arange(5)
    out = Augment(flip="no", resized_crop=(low, 1.0))(images, rows, seed=seed, epoch=0)
    u = uniform(Key(seed).fold("augment", 0, "resized crop"), (5, 4), rows=rows)
    for y, (area, shape, top, left) in zip(out, u, strict=True):
        share = low + (1 - low) * area
        ratio = min(4 / 3, 1 / share) ** (2 * shape - 1)
        box_h, box_w = h * math.sqrt(share / ratio), w * math.sqrt(share * ratio)
        assert box_h <= h * (1 + 1e-12)
        assert box_w <= w * (1 + 1e-12)
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
    assert np.array_equal(Augment(padding=0, flip="no")(x, np.arange(5), seed=0, epoch=0), x)


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
