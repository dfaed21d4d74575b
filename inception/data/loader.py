"""Batches of a data set, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from inception.data.augment import Augment
from inception.data.dataset import DataError, Dataset
from inception.data.feed import Feed, open_feed
from minigrad.layout import Array
from minigrad.random import Key, permutation


class Batch(NamedTuple):
    """What one training step reads."""

    images: Array  # (N, 3, H, W) float32, normalised, in channels-last memory; where the default backend has arrays
    labels: np.ndarray  # (N,) int64
    rows: np.ndarray  # (N,) int64, each picture's index in the data set


class Loader:
    """Cuts a data set into normalised batches.

    mean, std  (3,), of pixels in [0, 1]: `mean_and_std` of the training set, for every set
    seed       names the order (if `shuffle`) and the augmentation of every epoch
    augment    what is done to the pictures; None leaves them as they are
    drop_last  leave out the last batch if it is smaller than the others
    prefetch   how many batches a thread prepares ahead of the one in use; 0: each is prepared when asked for
    feed       how the pictures get to the default backend: with CuPy the batches are on the GPU, and made there
    waited     seconds that whoever reads the batches of the latest epoch has waited for them so far

    An epoch can be run again, or resumed at any batch, and gives the same bits, whatever `prefetch` is.
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
        augment: Augment | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        prefetch: int = 0,
    ):
        if not isinstance(dataset, Dataset):
            raise DataError(f"a Loader wants a Dataset, got {type(dataset).__name__}: open_data returns (train, test)")
        for name, number, least in (("the batch size", batch_size, 1), ("the batches to prefetch", prefetch, 0)):
            if not isinstance(number, (int, np.integer)) or number < least:
                raise DataError(f"{dataset.name}: {name} must be a whole number, at least {least}, got {number!r}")
        if not np.all(np.asarray(std) > 0):
            raise DataError(
                f"{dataset.name}: each channel's std must be above 0, got {std}: give one of equal pixels 1"
            )
        if np.shape(mean) != (3,) or np.shape(std) != (3,):
            raise DataError(f"{dataset.name}: mean and std must be three numbers each, got {mean} and {std}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.mean, self.std = mean, std
        self.augment, self.shuffle, self.drop_last, self.prefetch = augment, shuffle, drop_last, prefetch
        self.waited = 0.0

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @functools.cached_property
    def feed(self) -> Feed:
        """The way of the pictures to the default backend, which is settled when it is first needed."""
        return open_feed(self.dataset, self.augment, self.mean, self.std, self.seed)

    def batches(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from number `start` on.

        The thread ends with the iterator: after the last batch, at an exception (one of its own is raised here, in
        place of the batch it was to prepare), when the iterator is closed, or when nothing refers to it any more.
        """
        if start < 0:
            raise DataError(f"{self.dataset.name}: an epoch starts at batch 0, not at {start}")
        n, size = len(self.dataset), self.batch_size
        order = permutation(Key(self.seed).fold("order", epoch), n) if self.shuffle else np.arange(n)
        places = [order[i * size : (i + 1) * size] for i in range(start, len(self))]
        begun: deque[Future[Batch]] = deque()
        thread = ThreadPoolExecutor(1, thread_name_prefix="loader")  # there is none until something is submitted
        self.waited = 0.0
        feed = self.feed
        try:
            for i in range(len(places)):
                since = time.perf_counter()
                if self.prefetch:
                    for rows in places[i + len(begun) : i + 1 + self.prefetch]:
                        begun.append(thread.submit(self._batch, rows, epoch))
                    batch = begun.popleft().result()
                else:
                    batch = self._batch(places[i], epoch)
                batch = batch._replace(images=feed.deliver(batch.images))
                self.waited += time.perf_counter() - since
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)  # waits for the batch it is at

    def _batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """The batch of the pictures `rows`, yet to be delivered. It depends on its arguments alone, so any thread may
        prepare it."""
        return Batch(self.feed.prepare(rows, epoch), self.dataset.labels[rows], rows)
