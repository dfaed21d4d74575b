"""Products, concatenation, sums, dropout and the loss (dense.cu)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minigrad.backend import array_module
from minigrad.kernels.cuda.cublas import product
from minigrad.kernels.cuda.launch import BLOCKS, empty_matrix, launch, matrix, pack, side_by_side
from minigrad.layout import Array, empty_images, images
from minigrad.random import Key, StoredKey, check_repeatable


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    """A block of threads for every row, in float64."""
    (rows, ld), xp = matrix(logits[:, :, None, None]), array_module(logits)
    labels = xp.ascontiguousarray(labels, np.int64)
    results = xp.empty(len(rows), logits.dtype), xp.empty(rows.shape, logits.dtype)
    operands = rows, ld, labels, float(smoothing), *results, *rows.shape
    launch("dense", "cross_entropy", logits, len(rows), 1, *operands, parts=min(len(rows), BLOCKS))
    return results


def matmul(a: Array, b: Array, out: Array | None) -> Array:
    """One product for all matrices of a stack."""
    if out is None:
        stack = max(a.shape[:-2], b.shape[:-2], key=len)
        out = array_module(a).empty((*stack, a.shape[-2], b.shape[-1]), a.dtype)
    return product(a, b, out)


def concat(xs: list[Array]) -> Array:
    """The columns of the pixel matrices side by side."""
    n, _, h, w = xs[0].shape
    y = array_module(xs[0]).empty((n * h * w, sum(x.shape[1] for x in xs)), xs[0].dtype)
    for x, own in side_by_side(xs):
        (rows, ld), columns = matrix(x), y[:, own]
        values = pack(rows, columns)
        launch("dense", "copy_columns", x, *rows.shape, rows, ld, columns, y.shape[1], *rows.shape, values=values)
    return images(y, n, h, w)


def add(a: Array, b: Array, out: Array | None) -> Array:
    """a + b, into `out` or into a fresh channels-last array; pixel by pixel, so that neighbours in memory meet."""
    xp = array_module(a)
    out = empty_images(xp, a.shape, a.dtype) if out is None else out
    if a.ndim == 4:
        xp.add(*(x.transpose(0, 2, 3, 1) for x in (a, b)), out=out.transpose(0, 2, 3, 1))
        return out
    return xp.add(a, b, out=out)


def dropout(x: Array, p: float, key: Key, rows: Array | None) -> Array:
    """One pass; every element works out its own random number."""
    xp, n = array_module(x), x.shape[0] if x.ndim else 1
    check_repeatable(key, xp)
    grid = x if x.ndim == 4 else x.reshape(n, 1, math.prod(x.shape[1:]), 1)
    value: Any = key.value
    stream = value.reshape(1) if isinstance(key, StoredKey) else xp.full(1, value, np.uint64)
    numbers = stream.view(np.int64) if rows is None else xp.ascontiguousarray(xp.asarray(rows), np.int64)
    given, ld, y = *matrix(grid), empty_matrix(grid)
    sizes = *y.shape, math.prod(grid.shape[2:])
    launch("dense", "dropout", x, *y.shape, given, ld, stream, numbers, rows is not None, float(p), y, *sizes)
    return images(y, n, *grid.shape[2:]).reshape(x.shape)
