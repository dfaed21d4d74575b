"""The kernels on NumPy: the textbook, applied to a block of images.

A convolution is im2col and a matrix product. For a whole batch the patches would be far larger than the cache, so
each kernel cuts the batch into blocks (a few images, or a band of rows of one), runs the textbook on a block while
everything it touches stays in the cache, and lets `threads.each` spread the blocks over the cores. Read `block`
first in each function. The blocks follow from the shapes alone, and sums over blocks are added in a fixed order:
the results are the same bits for any number of threads.

    blocks.py     how the work is cut, wide rows, working memory
    patches.py    im2col, col2im, padding
    conv.py       products of patches and filters; winograd.py: 3×3 and 5×5 with fewer multiplications
    norm.py       batch norm and local response normalisation
    pool.py       maximum and mean of windows
"""

from __future__ import annotations

import numpy as np

from minigrad.kernels.numpy_.blocks import BLOCK_BYTES, Block, cut, each
from minigrad.kernels.numpy_.conv import (
    conv2d,
    conv2d_backward,
    conv2d_dw,
    conv2d_dx,
    conv2d_statistics,
    conv_bn_relu,
    conv_bn_relu_backward,
)
from minigrad.kernels.numpy_.norm import batch_norm, batch_norm_dx, lrn, lrn_dx, move_running, statistics
from minigrad.kernels.numpy_.pool import avg_pool, avg_pool_dx, max_pool, max_pool_dx, max_pool_winners
from minigrad.layout import Array, elementwise, empty_images
from minigrad.random import Key, uniform

__all__ = [
    "add",
    "avg_pool",
    "avg_pool_dx",
    "batch_norm",
    "batch_norm_dx",
    "concat",
    "conv2d",
    "conv2d_backward",
    "conv2d_dw",
    "conv2d_dx",
    "conv2d_statistics",
    "conv_bn_relu",
    "conv_bn_relu_backward",
    "cross_entropy",
    "dropout",
    "lrn",
    "lrn_dx",
    "matmul",
    "max_pool",
    "max_pool_dx",
    "max_pool_winners",
    "move_running",
    "statistics",
]


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    n, k = logits.shape
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    target = np.full((n, k), smoothing / k, logits.dtype)
    target[np.arange(n), labels] += 1 - smoothing
    terms = np.multiply(target, log_p, out=np.zeros_like(target), where=target != 0)  # 0 · −∞ is NaN
    return -terms.sum(axis=1), np.exp(log_p) - target


def matmul(a: Array, b: Array, out: Array | None) -> Array:
    return np.matmul(a, b, out=out)


def concat(xs: list[Array]) -> Array:
    n, _, h, w = xs[0].shape
    y = empty_images(np, (n, sum(x.shape[1] for x in xs), h, w), xs[0].dtype)

    def block(part: Block) -> None:
        end = 0
        for x in xs:
            start, end = end, end + x.shape[1]
            y[part[0], start:end, part[1]] = x[part[0], :, part[1]]

    each(block, cut(n, (h, w), y.itemsize * y.shape[1], BLOCK_BYTES))
    return y


def add(a: Array, b: Array, out: Array | None) -> Array:
    if a.ndim != 4:
        return np.asarray(np.add(a, b, out=out))  # of 0-d arrays NumPy makes a scalar
    total = empty_images(np, a.shape, a.dtype) if out is None else out

    def block(part: Block) -> None:
        x, y, z = (m[part[0], :, part[1]].transpose(0, 2, 3, 1) for m in (a, b, total))
        np.add(x, y, out=z)

    each(block, cut(len(a), a.shape[2:], a.itemsize * a.shape[1], BLOCK_BYTES))
    return total


def dropout(x: Array, p: float, key: Key, rows: Array | None) -> Array:
    scale = (uniform(key, x.shape, rows=rows) >= p).astype(x.dtype)
    scale *= 1 / (1 - p)
    return elementwise(np.multiply, x, scale)
