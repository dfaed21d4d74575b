"""How well a model does on a data set, and its logits batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from inception.console import progress
from inception.data import Batch, Loader
from minigrad import Tensor, backend, no_grad, ops
from minigrad.errors import ShapeError
from minigrad.layout import Array, images, pixels
from minigrad.nn import Module


class Evaluation(NamedTuple):
    """How a model does on a data set."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of pictures whose largest logit is the label's


class Tally(NamedTuple):
    """A data set's pictures counted by their class."""

    loss: float  # summed cross-entropy
    right: np.ndarray  # (K,) int64, of each class those that were recognised
    seen: np.ndarray  # (K,) int64, of each class


def tally(model: Module, loader: Loader, *, quiet: bool = False, check: Callable[[], None] = lambda: None) -> Tally:
    """Count what `model` recognises in evaluation mode, over the whole loader; the mode is put back.

    check   called between batches: what it raises ends the count
    """
    mode = model.training
    model.eval()
    classes = len(loader.dataset.classes)
    loss, right, seen = 0.0, np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    try:
        with progress("evaluate", len(loader.dataset), unit="img", quiet=quiet) as bar:
            for batch, logits in predictions(model, loader):
                labels = backend.asarray(batch.labels)
                n = len(batch.labels)
                loss += ops.cross_entropy(Tensor(logits), labels).item() * n
                hits = backend.to_host(logits.argmax(axis=1) == labels)
                right += np.bincount(batch.labels[hits], minlength=classes)
                seen += np.bincount(batch.labels, minlength=classes)
                bar.update(n)
                check()
    finally:
        model.train(mode)
    return Tally(loss, right, seen)


def evaluate(
    model: Module, loader: Loader, *, quiet: bool = False, check: Callable[[], None] = lambda: None
) -> Evaluation:
    """Loss and accuracy of `model`, counted as by `tally`."""
    loss, right, seen = tally(model, loader, quiet=quiet, check=check)
    n = max(int(seen.sum()), 1)
    return Evaluation(loss / n, int(right.sum()) / n)


def predictions(model: Module, loader: Loader) -> Iterator[tuple[Batch, Array]]:
    """Each batch of the loader with the model's logits (N, K), without recording a graph."""
    for batch in loader.batches(0):
        with no_grad():  # which must end before the yield, or it would hold for the caller
            logits = model(to_tensor(batch.images)).data
        yield batch, logits


def to_tensor(pictures: Array) -> Tensor:
    """A host batch (N, C, H, W) as a tensor of the default backend, channels-last there too."""
    if pictures.ndim != 4:
        raise ShapeError(f"to_tensor wants a batch (N, C, H, W), got {pictures.shape}: x[None] makes one of a picture")
    n, _, h, w = pictures.shape
    return Tensor(images(backend.asarray(pixels(pictures)), n, h, w))
