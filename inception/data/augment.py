"""From stored pictures to a network's input: random changes that leave the class as it is, then normalised floats.

What happens to a picture depends on (seed, epoch, its index in the data set) alone: not on the batch, its order, the
threads, or how far ahead it is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inception.data.dataset import DataError
from minigrad import layout
from minigrad.random import Key, integers, uniform

FLIPS = ("no", "random", "alternate")
_FAR = 2**15  # pixels: wider than any picture, and sums of such numbers fit into 32 bits
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601: how bright red, green and blue look


@dataclass(frozen=True)
class Augment:
    """What is done to training pictures, in this order. `Augment()` is the usual recipe for CIFAR.

    resized_crop  (low, high): cut out a random share of the area, of a shape from 3:4 to 4:3, and enlarge it to the
                  picture's size (0.08, 1.0 in arXiv:1409.4842, section 6); takes the place of `padding`
    padding       shift by up to so many pixels along each axis, black moving in (arXiv:1512.03385, section 4.2)
    flip          mirror left and right: "random", by a fair coin, anew in every epoch; "alternate", in every other
                  epoch, a coin for each picture saying in which, so that two epochs show both; "no"
    jitter        change brightness, contrast and saturation, each by a factor from 1 − jitter to 1 + jitter
    cutout        the side in pixels of a square put to `fill` around a random place (arXiv:1708.04552)

    Raises DataError naming the field that is out of range.
    """

    padding: int = 4
    flip: str = "random"
    cutout: int = 0
    jitter: float = 0.0
    resized_crop: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("padding", "cutout"):
            if not 0 <= getattr(self, name) <= _FAR:
                raise DataError(f"augment: {name} must be from 0 to {_FAR} pixels, got {getattr(self, name)}")
        if self.flip not in FLIPS:
            raise DataError(f"augment: flip must be one of {', '.join(FLIPS)}, got {self.flip!r}")
        if not 0 <= self.jitter <= 1:
            raise DataError(f"augment: jitter must be from 0 to 1, got {self.jitter}")
        if self.resized_crop is not None and not 0 < self.resized_crop[0] <= self.resized_crop[1] <= 1:
            raise DataError(f"augment: resized_crop must be two shares, 0 < low ≤ high ≤ 1, got {self.resized_crop}")

    def __call__(
        self, images: np.ndarray, rows: np.ndarray, *, seed: int, epoch: int, fill: Any = (0, 0, 0)
    ) -> np.ndarray:
        """The pictures as `epoch` shows them: (N, H, W, 3) uint8, `images` left as they are.

        images  (N, H, W, 3) uint8
        rows    (N,) int, each picture's index in the data set
        fill    (3,) what cutout leaves, in levels from 0 to 255
        """
        h, w = images.shape[1:3]
        return self.apply(images, self.draw(rows, (h, w), seed=seed, epoch=epoch), fill)

    def draw(self, rows: np.ndarray, size: tuple[int, int], *, seed: int, epoch: int) -> Changes:
        """What `epoch` does to the pictures `rows` of `size` = (H, W)."""
        key, n = Key(seed).fold("augment", epoch), len(rows)
        boxes = shift = mirrored = factors = corners = None

        def chance(what: str, numbers: int) -> np.ndarray:
            return uniform(key.fold(what), (n, numbers), rows=rows)

        if self.resized_crop:
            boxes = chance("resized crop", 4)
        elif self.padding:
            shift = integers(key.fold("crop"), 2 * self.padding + 1, (n, 2), rows=rows) - self.padding
        if self.flip == "alternate":
            mirrored = (integers(Key(seed).fold("augment", "flip"), 2, n, rows=rows) + epoch) % 2 == 1
        elif self.flip == "random":
            mirrored = integers(key.fold("flip"), 2, n, rows=rows) == 1
        if self.jitter:
            factors = 1 + self.jitter * (2 * chance("jitter", 3) - 1)
        if self.cutout:
            corners = np.floor(chance("cutout", 2) * size).astype(np.int64) - self.cutout // 2
        return Changes(boxes, shift, mirrored, factors, corners)

    def apply(self, images: np.ndarray, changes: Changes, fill: Any) -> np.ndarray:
        """Do to each of `images` what was drawn for it; arguments and result as of a call."""
        if self.resized_crop and changes.boxes is not None:
            images = _resized_crop(images, changes.boxes, self.resized_crop)
        if changes.shift is not None:
            images = _crop(images, changes.shift, self.padding)
        if changes.mirrored is not None:
            images = _mirror(images, np.flatnonzero(changes.mirrored))
        if changes.factors is not None:
            images = _jitter(images, changes.factors)
        if changes.corners is not None:
            images = _cutout(images, changes.corners, self.cutout, fill)
        return images


class Changes(NamedTuple):
    """What was drawn for each of N pictures, in the order in which it is done; None: nothing of the kind is done."""

    boxes: np.ndarray | None = None  # (N, 4) in [0, 1): see _resized_crop
    shift: np.ndarray | None = None  # (N, 2) int64: pixels down and right, from −padding to padding
    mirrored: np.ndarray | None = None  # (N,) bool
    factors: np.ndarray | None = None  # (N, 3): of brightness, contrast and saturation
    corners: np.ndarray | None = None  # (N, 2) int64: top and left of the square that is cut out


# Below, pictures are taken one at a time: slices of one picture are plain copies within the cache, where an index of
# arrays over the whole batch would move three bytes at a time.


def _crop(images: np.ndarray, shift: np.ndarray, padding: int) -> np.ndarray:
    """y[n, i, j] = x[n, i + shift[n, 0], j + shift[n, 1]], black outside."""
    n, h, w, _ = images.shape
    padded = np.zeros((n, h + 2 * padding, w + 2 * padding, 3), np.uint8)
    padded[:, padding : padding + h, padding : padding + w] = images
    out = np.empty_like(images)
    for i, (top, left) in enumerate((shift + padding).tolist()):
        out[i] = padded[i, top : top + h, left : left + w]
    return out


def _mirror(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The pictures numbered `which` with left and right exchanged."""
    _, h, w, c = images.shape
    backwards = np.arange(w * c).reshape(w, c)[::-1].ravel()  # of a row of pixels as one vector
    out = images.copy()
    out[which] = images[which].reshape(-1, w * c).take(backwards, axis=1).reshape(-1, h, w, c)
    return out


def _resized_crop(images: np.ndarray, chance: np.ndarray, area: tuple[float, float]) -> np.ndarray:
    """A box of each picture, enlarged to the whole by linear interpolation.

    chance  (N, 4) in [0, 1): share of the area, shape (width to height beside the picture's own, logarithmically even
            within 3:4 and 4:3, or as far as the area leaves room), place from top and from left
    """
    _, h, w, _ = images.shape
    shares = area[0] + (area[1] - area[0]) * chance[:, 0]
    most = np.minimum((4 / 3) ** 0.5, shares**-0.5)  # so that the box fits into the picture, with all of its area
    stretch = most ** (2 * chance[:, 1] - 1)  # √(width / height) beside the picture's own
    heights, widths = h * np.sqrt(shares) / stretch, w * np.sqrt(shares) * stretch
    out = np.empty_like(images)
    for i, (box_h, box_w, top, left) in enumerate(zip(heights, widths, chance[:, 2], chance[:, 3], strict=True)):
        above, below, v = _between(h, top * (h - box_h), box_h)
        before, after, u = _between(w, left * (w - box_w), box_w)
        v, u = v[:, None, None], u[:, None]
        lines = images[i].take(above, axis=0) * (1 - v) + images[i].take(below, axis=0) * v  # (H, W, 3) float32
        out[i] = np.rint(lines.take(before, axis=1) * (1 - u) + lines.take(after, axis=1) * u)
    return out


def _between(size: int, start: float, length: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `size` points spread over [start, start + length) lie: pixel before, pixel after, share of the latter."""
    place = (start + (np.arange(size) + 0.5) * (length / size) - 0.5).clip(0, size - 1)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, size - 1), (place - before).astype(np.float32)


def _jitter(images: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Brightness b, then contrast c about the mean grey, then saturation s about each pixel's grey, rounded once:

    y = s·z + (1 − s)·grey(z)    where z = c·b·x + (1 − c)·b·mean(grey(x))

    which is one 3×3 matrix and one number for each picture, as all three are linear.

    factors  (N, 3): b, c, s
    """
    _, h, w, _ = images.shape
    means = (images.sum(axis=(1, 2), dtype=np.int64) * _GREY).sum(1) / (h * w)  # sums of integers: exact in any order
    out = np.empty_like(images)
    for i, (b, c, s) in enumerate(factors):
        mixing = (b * c * (s * np.eye(3) + (1 - s) * _GREY[:, None])).astype(np.float32)  # from channel, to channel
        y = images[i].reshape(h * w, 3).astype(np.float32) @ mixing
        y += np.float32((1 - c) * b * means[i] + 0.5)  # half a level more, as uint8 rounds down
        out[i] = y.clip(0, 255, out=y).reshape(h, w, 3)
    return out


def _cutout(images: np.ndarray, corners: np.ndarray, side: int, fill: Any) -> np.ndarray:
    """A square of each picture put to `fill`; its parts outside the picture are lost."""
    out = images.copy()
    for i, (top, left) in enumerate(corners.tolist()):
        out[i, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = fill
    return out


def normalise(images: np.ndarray, mean: np.ndarray, std: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Scale pixels to [0, 1], subtract the mean and divide by the standard deviation of each channel.

        y = x · 1/(255·std) − mean/std        one product and one sum per value, both in `dtype`

    images     (N, H, W, 3) uint8
    mean, std  (3,), of pixels in [0, 1]
    returns    (N, 3, H, W) of `dtype` in channels-last memory
    """
    n, h, w, _ = images.shape
    # A row of pixels is one long vector, so that NumPy's inner loop is not over three channels.
    scale = np.tile(1 / (255 * np.asarray(std)), w).astype(dtype)  # (W·3,)
    shift = np.tile(np.asarray(mean) / np.asarray(std), w).astype(dtype)
    y = images.reshape(n * h, w * 3) * scale
    y -= shift
    return layout.images(y.reshape(n * h * w, 3), n, h, w)
