"""Labelled pictures: what every source returns, and what can be asked of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from minigrad.errors import MinigradError
from minigrad.random import Key, permutation

_BLOCK = 1000  # pictures counted at a time: bincount widens each value to eight bytes
_SAMPLE = 5000  # pictures that stand for all if they have to be decoded


class DataError(MinigradError, ValueError):
    """A data set, one of its files or a way of loading it is not what it should be."""


class Images(Protocol):
    """What looks like an array of pictures and decodes them when they are asked for (`pictures.Pictures`)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    ndim: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """The pictures in `rows`: an int, a slice or an int array."""

    def select(self, rows: np.ndarray) -> Images:
        """Those in `rows` as another such array, none decoded."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures and what they show.

    images   (N, H, W, 3) uint8, red, green, blue: channels-last, like every activation in minigrad
             (in memory, or decoded as their rows are asked for)
    labels   (N,) int64, each an index into `classes`
    classes  the name of each class
    name     what to call the set in messages and reports

    Raises DataError if these do not fit together.
    """

    images: np.ndarray | Images
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        for what, given in (("images", images), ("labels", labels)):
            if not hasattr(given, "dtype"):
                raise DataError(f"{self.name}: {what} must be an array, got {type(given).__name__}: use numpy.array")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(
                f"{self.name}: images must be uint8 of shape (N, H, W, 3), got {images.dtype} {images.shape}"
                + pictures_remedy(images)
            )
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.name}: labels must be int64 of shape ({len(images)},), one for each picture, "
                f"got {labels.dtype} {labels.shape}" + labels_remedy(labels)
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if wrong.size:
            raise DataError(
                f"{self.name}: the label in row {wrong[0]} is {labels[wrong[0]]}, "
                f"but the {len(self.classes)} classes are numbered from 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)


def pictures_remedy(x: Any) -> str:
    """How pictures that are not uint8 of shape (N, H, W, 3) become so, where that can be told."""
    if x.ndim == 4 and x.shape[1] == 3 and x.shape[3] != 3:
        return ": put the channels last with x.transpose(0, 2, 3, 1)"
    if x.dtype == np.uint8 or x.dtype.kind not in "iuf" or not x.size:
        return ""
    low, high = x.min(), x.max()
    if not (low >= 0 and np.isfinite(high)):
        return ": bring them to 0 … 255 and convert with x.round().astype('uint8')"
    if high <= 255 and (x.dtype.kind != "f" or high > 1):
        return f": convert with x{'.round()' * (x.dtype.kind == 'f')}.astype('uint8')"
    if x.dtype == np.uint16 and high > 0x7FFF:
        return ": bring them to 0 … 255 with (x // 257).astype('uint8')"
    scale = "255" if high <= 1 else f"(255 / {high})"
    return f": bring them to 0 … 255 with (x * {scale}).round().astype('uint8')"


def labels_remedy(y: Any) -> str:
    """How labels that are not whole numbers (N,) become so, where that can be told."""
    if y.ndim == 2 and y.shape[1] > 1:
        return ": of one-hot rows take y.argmax(axis=1)"
    return ": convert with y.astype('int64')" if y.ndim == 1 and y.dtype != np.int64 else ""


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Set a random `fraction` of the pictures aside, the same ones for the same seed: (train, validation).

    Every picture is in exactly one of the two, and both keep the order of `dataset`.
    Raises DataError if one of them would be empty.
    """
    n = len(dataset)
    aside = round(n * fraction) if math.isfinite(fraction) else 0
    if not 0 < aside < n:
        raise DataError(
            f"{dataset.name}: a validation share of {fraction:g} puts {max(aside, 0)} of {n} pictures aside: "
            f"choose one between 0 and 1 that leaves pictures on both sides"
        )
    order = permutation(Key(seed).fold("split"), n)

    def part(rows: np.ndarray, name: str) -> Dataset:
        rows, images = np.sort(rows), dataset.images
        images = images[rows] if isinstance(images, np.ndarray) else images.select(rows)
        return replace(dataset, images=images, labels=dataset.labels[rows], name=f"{dataset.name} {name}")

    return part(order[aside:], "without validation"), part(order[:aside], "validation")


def mean_and_std(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation of each channel, pixels scaled to [0, 1]: two float64 arrays (3,).

    A channel has 256 levels, so counting each level is enough. The sums are integers; only the last division and the
    root round. If the pictures have to be decoded, 5,000 of them, evenly spread, stand for all.
    A channel of one value has a standard deviation of 1 here, so that normalising makes it 0.
    Raises DataError if there are no pictures.
    """
    if not len(dataset):
        raise DataError(f"{dataset.name}: no pictures to take the mean of")
    n = len(dataset) if isinstance(dataset.images, np.ndarray) else min(len(dataset), _SAMPLE)
    rows = np.arange(n) * len(dataset) // n
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, n, _BLOCK):
        block = dataset.images[rows[start : start + _BLOCK]]
        for channel in range(3):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    levels = np.arange(256)
    total = int(counts[0].sum())
    sums = [int(s) for s in counts @ levels]
    squares = [int(s) for s in counts @ levels**2]
    mean = np.array([s / (255 * total) for s in sums])
    variance = [(total * q - s * s) / (255 * total) ** 2 for s, q in zip(sums, squares, strict=True)]
    return mean, np.sqrt([v or 1.0 for v in variance])
