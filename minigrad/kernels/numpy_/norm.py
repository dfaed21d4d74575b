"""Normalisation: column statistics and an affine map of the pixel matrix, block by block."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from minigrad.kernels.numpy_.blocks import (
    BLOCK_BYTES,
    BYTE,
    Block,
    Source,
    column_sums,
    cut,
    each,
    keep_where,
    matrix,
    repeated,
    row_blocks,
    rows,
    scratch,
    widen,
)
from minigrad.layout import Array, empty_images, pixels


def statistics(x: Array) -> tuple[Array, Array]:
    """The moments of every block, merged"""
    m = pixels(x)
    parts = row_blocks(m)
    found: dict[int, Moments] = {}
    each(lambda i: found.update({i: moments(m[parts[i]])}), range(len(parts)))
    return merged(found)


def move_running(running_mean: Array, running_var: Array, mean: Array, var: Array, n: int, momentum: float) -> None:
    for running, batch in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        running *= 1 - momentum
        running += (momentum * batch).astype(running.dtype)


SAMPLE = 64  # pixels of a block whose mean is close enough to the block's


class Moments(NamedTuple):
    """Of the rows of a matrix: how many, their mean, and the sum of squares around it, float64 (C,)."""

    n: int
    mean: Array
    squares: Array


def moments(values: Array) -> Moments:
    # Sums of x − shift, not of x: Σx² − (Σx)²/n would lose the variance of a channel far from zero.
    n, c = values.shape
    some = values[:: max(n // SAMPLE, 1)]
    shift = column_sums(some) / len(some)  # near the mean is enough
    wide, tiled = widen(values, repeated(shift))
    centred = np.subtract(wide, tiled, out=scratch("centred", wide.shape, wide.dtype))
    first = column_sums(centred, c).astype(np.float64)
    centred *= centred
    second = column_sums(centred, c).astype(np.float64)
    return Moments(n, shift + first / n, second - first * first / n)


def merged(found: dict[int, Moments]) -> tuple[Array, Array]:
    """Mean and variance of all blocks together, summed in the order of their numbers."""
    counts, means, squares = (np.array(column) for column in zip(*(found[i] for i in sorted(found)), strict=True))
    n, counts = counts.sum(), counts[:, None]
    mean = (counts * means).sum(0) / n
    return mean, (squares + counts * (means - mean) ** 2).sum(0) / n


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """x·scale + shift: a pass less over a block than (x − mean)·scale + beta, which would err less where the mean is
    far from zero: in float32 by 8e-7 instead of 5e-6 at 30 standard deviations"""
    scale, shift = (repeated(v) for v in scale_and_shift(mean, var, gamma, beta, eps))
    zero = np.zeros_like(scale)  # in this form maximum is faster than with a plain 0
    y = empty_images(np, x.shape, x.dtype)
    source, target = pixels(x), pixels(y)

    def block(part: slice) -> None:
        out, s, t, nothing = widen(target[part], scale, shift, zero)
        np.multiply(source[part].reshape(out.shape), s, out=out)
        out += t
        if relu:
            np.maximum(out, nothing, out=out)

    each(block, row_blocks(source))
    return y


def batch_norm_dx(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """One pass for the sums, one for dx"""
    source, scale, dgamma, dbeta = through_batch_norm([dy], x, mean, var, gamma, beta, eps, relu, through_statistics)
    return stored(source, scale, x), dgamma, dbeta


def stored(source: Source, scale: Array, like: Array) -> Array:
    """What a source computes, times a number for every channel, as images of the shape of `like`."""
    whole, tiled = empty_images(np, like.shape, like.dtype), repeated(scale)

    def block(part: Block) -> None:
        out, s = widen(matrix(rows(whole, part)), tiled)
        np.multiply(source(part).reshape(out.shape), s, out=out)

    each(block, cut(len(like), like.shape[2:], like.itemsize * like.shape[1], BLOCK_BYTES))
    return whole


def through_batch_norm(
    dys: list[Array], x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Source, Array, Array, Array]:  # fmt: skip
    """The gradient of x over the scale γ/√(var + eps), to be computed block by block where it is read; the scale;
    dgamma and dbeta. A convolution multiplies its filters by the scale rather than every pixel.

    dys   the upstream gradient, cut along the channels; in one piece without relu
    """
    scale = (gamma / np.sqrt(var + eps)).astype(x.dtype)
    centre, edge, turned = (repeated(v) for v in (mean.astype(x.dtype), *positive_beyond(scale, beta)))
    c = x.shape[1]
    dz = empty_images(np, x.shape, x.dtype) if relu else dys[0]  # the gradient before the ReLU
    parts = cut(len(x), x.shape[2:], x.itemsize * c, BLOCK_BYTES)
    sums = np.empty((2, len(parts), c))

    def reduce(i: int) -> None:
        """dz; Σ dz and Σ dz·(x − mean)."""
        values, m, e, t = widen(matrix(rows(x, parts[i])), centre, edge, turned)
        dz_block = matrix(rows(dz, parts[i])).reshape(values.shape)
        centred = np.subtract(values, m, out=scratch("centred", values.shape, x.dtype))
        if relu:
            passed = np.greater(centred, e, out=scratch("mask", values.shape, BYTE).view(bool))
            np.not_equal(passed, t, out=passed)
            keep_where(passed, joined(dys, parts[i]).reshape(values.shape), out=dz_block)
        centred *= dz_block
        sums[:, i] = column_sums(dz_block, c), column_sums(centred, c)

    each(reduce, range(len(parts)))
    dbeta, dot = sums.sum(1)
    dot += (mean.astype(x.dtype) - mean) * dbeta  # Σ dz·(x − mean) with the mean before it was rounded
    dgamma = dot / np.sqrt(var + eps)
    if not through_statistics:
        return partial(rows, dz), scale, dgamma.astype(gamma.dtype), dbeta.astype(beta.dtype)
    # dx = scale · (dz − mean(dz) − (x − mean) · mean(dz·(x − mean)) / (var + eps)), in brackets dz + x·slope + level
    n = x.size // c
    by_x = -dot / (n * (var + eps))  # float64
    slope, level = (repeated(v.astype(x.dtype)) for v in (by_x, -dbeta / n - by_x * mean))

    def source(part: Block) -> Array:
        values, a, b = widen(matrix(rows(x, part)), slope, level)
        dx = np.multiply(values, a, out=scratch("dx", values.shape, x.dtype))
        dx += b
        dx += matrix(rows(dz, part)).reshape(values.shape)
        return dx.reshape(rows(x, part).shape)

    return source, scale, dgamma.astype(gamma.dtype), dbeta.astype(beta.dtype)


def joined(xs: list[Array], part: Block) -> Array:
    """A block of several images side by side, as one matrix (pixels, ΣC) in C order."""
    grids = [rows(x, part) for x in xs]
    if len(grids) == 1 and grids[0].flags.c_contiguous:
        return matrix(grids[0])
    whole = scratch("joined", (*grids[0].shape[:3], sum(x.shape[1] for x in xs)), xs[0].dtype)
    end = 0
    for grid in grids:
        start, end = end, end + grid.shape[3]
        whole[..., start:end] = grid
    return matrix(whole)


def scale_and_shift(mean: Array, var: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array]:
    """Batch norm as x·scale + shift, both (C,) in gamma's dtype."""
    scale = gamma / np.sqrt(var.astype(np.float64) + eps)
    return scale.astype(gamma.dtype), (beta - mean * scale).astype(gamma.dtype)


def positive_beyond(scale: Array, beta: Array) -> tuple[Array, Array]:
    """Beyond which value v·scale + beta is positive, and for which channels that means below it: both (C,)."""
    edge = np.where(beta > 0, -np.inf, np.inf).astype(scale.dtype)  # where the scale is 0
    with np.errstate(invalid="ignore"):  # of weights that are infinite
        np.divide(-beta, scale, out=edge, where=scale != 0)
    below = scale < 0
    np.nextafter(edge, -np.inf, out=edge, where=below)  # what is not > edge is ≤ edge
    return edge, below


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    y = empty_images(np, x.shape, x.dtype)
    source, target = pixels(x), pixels(y)

    def block(part: slice) -> None:
        rows = source[part]
        np.multiply(rows, lrn_divisor(rows, size, alpha, k) ** -beta, out=target[part])

    each(block, row_blocks(source))
    return y


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    dx = empty_images(np, x.shape, x.dtype)
    source, upstream, target = pixels(x), pixels(dy), pixels(dx)

    def block(part: slice) -> None:
        rows, up = source[part], upstream[part]
        divisor = lrn_divisor(rows, size, alpha, k)
        direct = up * divisor**-beta
        through = neighbours(direct * rows / divisor, (size - 1) // 2, size // 2)  # the mirrored window
        target[part] = direct - rows * through * (2 * alpha * beta / size)

    each(block, row_blocks(source))
    return dx


def lrn_divisor(rows: Array, size: int, alpha: float, k: float) -> Array:
    return k + alpha / size * neighbours(rows * rows, size // 2, (size - 1) // 2)


def neighbours(rows: Array, before: int, after: int) -> Array:
    """For each channel the sum over channels c − before … c + after, clipped at the ends."""
    c = rows.shape[1]
    total = rows.copy()
    for offset in range(1, min(before, c - 1) + 1):
        total[:, offset:] += rows[:, :-offset]
    for offset in range(1, min(after, c - 1) + 1):
        total[:, :-offset] += rows[:, offset:]
    return total
