"""Batches of a data set, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from inception.data.augment import crop_and_flip, normalise
from inception.data.dataset import DataError, Dataset
from minigrad.random import Key, permutation


class Batch(NamedTuple):
    """What one training step reads."""

    images: np.ndarray  # (N, 3, H, W) float32, normalised, in channels-last memory
    labels: np.ndarray  # (N,) int64
    rows: np.ndarray  # (N,) int64, each picture's index in the data set


class Loader:
    """Cuts a data set into normalised batches.

    mean, std  (3,), of pixels in [0, 1]: `mean_and_std` of the training set, for every set
    seed       names the order (if `shuffle`) and the augmentation (if `augment`) of every epoch
    augment    shift by up to `padding` pixels and mirror, as in `crop_and_flip`
    drop_last  leave out the last batch if it is smaller than the others

    There is no state: an epoch can be run again, or resumed at any batch, and gives the same bits.
    Raises DataError if an argument is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        mean: np.ndarray,
        std: np.ndarray,
        seed: int = 0,
        augment: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        padding: int = 4,
    ):
        if batch_size < 1:
            raise DataError(f"{dataset.name}: the batch size must be at least 1, got {batch_size}")
        if padding < 0:
            raise DataError(f"{dataset.name}: the padding must be at least 0 pixels, got {padding}")
        if not np.all(np.asarray(std) > 0):
            raise DataError(f"{dataset.name}: each channel's std must be above 0 to divide by, got {std}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.mean, self.std = mean, std
        self.augment, self.shuffle, self.drop_last, self.padding = augment, shuffle, drop_last, padding

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        n = len(self.dataset)
        order = permutation(Key(self.seed).fold("order", epoch), n) if self.shuffle else np.arange(n)
        for i in range(start, len(self)):
            yield self._batch(order[i * self.batch_size : (i + 1) * self.batch_size], epoch)

    def _batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """The batch of the pictures `rows`. It depends on its arguments alone, so any thread may prepare it."""
        images = self.dataset.images[rows]
        if self.augment:
            key = Key(self.seed).fold("augment", epoch)
            images = crop_and_flip(images, key, rows, padding=self.padding)
        return Batch(normalise(images, self.mean, self.std), self.dataset.labels[rows], rows)
