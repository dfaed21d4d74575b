"""Normalisation: statistics of columns and an affine map of the rows of pixels, block by block."""

from __future__ import annotations

import functools
import math

import numpy as np

from minigrad.kernels.loops.blocks import chunk, rows, spread
from minigrad.kernels.loops.compiled import compiled, take
from minigrad.kernels.loops.dense import concat
from minigrad.layout import Array, empty_images

WIDE = 128  # values that an inner loop should have: pixels of few channels are taken several at a time


def repeats(n: int, c: int, *matrices: Array) -> int:
    """How many pixels to see as one row: a divisor of n."""
    if any(m.shape[1] != c for m in matrices):
        return 1
    return next(r for r in (32, 16, 8, 4, 2, 1) if r == 1 or (n % r == 0 and c * r <= WIDE))


@functools.cache
def none(dtype: np.dtype) -> Array:
    """No batch norm."""
    return np.empty((0, 0), dtype)


# --- statistics


@compiled
def moments(y, mean, square):
    """Mean and Σ (y − mean)² of the columns of a block, by way of the differences from its first pixel."""
    base, total, squares = y[0].astype(np.float64), np.zeros(y.shape[1]), np.zeros(y.shape[1])
    for m in range(len(y)):
        line = y[m]
        for q in range(len(base)):
            d = line[q] - base[q]
            total[q] += d
            squares[q] += d * d
    for q in range(len(base)):
        d = total[q] / len(y)
        square[q] = squares[q] - total[q] * d
        mean[q] = base[q] + d


@compiled
def block_moments(turn, x, c, counts, means, squares, step):
    """The moments of each block."""
    block = take(turn)
    while block >= 0:
        values = x[block * step : block * step + step, :c]
        moments(values, means[block], squares[block])
        counts[block] = len(values)
        block = take(turn)


@compiled
def merged(means, squares, counts):
    """Mean and variance from the moments of blocks of so many pixels."""
    n, mean, var = counts.sum(), np.zeros(means.shape[1]), np.zeros(means.shape[1])
    for b in range(len(means)):
        for q in range(len(mean)):
            mean[q] += means[b, q] * counts[b] / n
    for b in range(len(means)):
        for q in range(len(mean)):
            var[q] += (squares[b, q] + (means[b, q] - mean[q]) ** 2 * counts[b]) / n
    return mean, var


def statistics(x: Array) -> tuple[Array, Array]:
    """The moments of every block, merged"""
    n, c = x.size // x.shape[1], x.shape[1]
    step = chunk(n, c)
    counts, (means, squares) = room_for_moments(-(-n // step), c)
    spread(block_moments, len(means), rows(x), c, counts, means, squares, step)
    return merged(means, squares, counts)


def room_for_moments(blocks: int, c: int) -> tuple[Array, Array]:
    """How many pixels a block has, (blocks,); and their means and sums of squares, (2, blocks, C)."""
    return np.zeros(blocks, np.int64), np.empty((2, blocks, c))


# --- forward


@compiled
def folded(mean, var, gamma, beta, eps):
    """Batch norm as y·scale + shift: (2, C)."""
    norm = np.empty((2, len(gamma)), gamma.dtype)
    for q in range(len(gamma)):
        scale = gamma[q] / math.sqrt(var[q] + eps)
        norm[0, q], norm[1, q] = scale, beta[q] - mean[q] * scale
    return norm


def scale_and_shift(mean: Array, var: Array, gamma: Array, beta: Array, eps: float) -> Array:
    return folded(mean.astype(np.float64), var.astype(np.float64), gamma, beta, float(eps))


@compiled
def apply(y, norm, relu):
    """y·scale + shift of every row, in place; then max(0, ·)."""
    zero, scale, shift = y.dtype.type(0), norm[0], norm[1]
    for m in range(len(y)):
        line = y[m]
        for q in range(len(scale)):
            value = line[q] * scale[q] + shift[q]
            line[q] = zero if relu and value < zero else value


@compiled
def affine(turn, x, norm, relu, y, step):
    """x·scale + shift of the rows of each block; then max(0, ·)."""
    zero, scale, shift = y.dtype.type(0), norm[0], norm[1]
    block = take(turn)
    while block >= 0:
        for m in range(block * step, min(block * step + step, len(y))):
            source, target = x[m], y[m]
            for q in range(len(scale)):
                value = source[q] * scale[q] + shift[q]
                target[q] = zero if relu and value < zero else value
        block = take(turn)


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """x·scale + shift: less work than (x − mean)·scale + beta, which would err less where the mean is far from zero: in
    float32 by 8e-7 instead of 5e-6 at 30 standard deviations"""
    y, (n, c) = empty_images(np, x.shape, x.dtype), (x.size // x.shape[1], x.shape[1])
    xs, norm = rows(x), scale_and_shift(mean, var, gamma, beta, eps)
    r = repeats(n, c, xs)
    step = chunk(n // r, c * r)
    xs, ys = (xs.reshape(n // r, c * r) if r > 1 else xs), rows(y).reshape(n // r, c * r)
    spread(affine, -(-n // r // step), xs, np.tile(norm, r) if r > 1 else norm, relu, ys, step)
    return y


# --- backward


@compiled
def sums_of_gradient(turn, dz, x, norm, relu, mean, sums, step):
    """Σ g and Σ g·(x − mean) of each block, of g = dz where the ReLU let x pass, else 0."""
    zero, scale, shift = x.dtype.type(0), norm[0], norm[1]
    block = take(turn)
    while block >= 0:
        first, second = np.zeros(len(scale)), np.zeros(len(scale))
        for m in range(block * step, min(block * step + step, len(x))):
            values, up = x[m], dz[m]
            for q in range(len(scale)):
                value = values[q]
                g = up[q] if not relu or value * scale[q] + shift[q] > zero else zero
                first[q] += g
                second[q] += np.float64(g) * (np.float64(value) - mean[q])
        sums[block, 0], sums[block, 1] = first, second
        block = take(turn)


@compiled
def gradient_map(sums, mean, var, gamma, beta, eps, n, relu, through_statistics):
    """What the gradient of x is made from: g·1 + x·slope + level, times scale; and dgamma, dbeta.

        dx = scale · (g − mean(g) − (x − mean) · mean(g·(x − mean)) / (var + eps))

    norm (4, C): scale and shift, whose sign at x tells whether g is dz or 0, slope, level. Without ReLU the first is 0
    and the second 1.
    """
    c = len(gamma)
    norm, scales, dgamma, dbeta = np.empty((4, c), gamma.dtype), gamma.copy(), gamma.copy(), gamma.copy()
    for q in range(c):
        first, second = 0.0, 0.0
        for b in range(len(sums)):
            for r in range(q, sums.shape[2], c):
                first += sums[b, 0, r]
                second += sums[b, 1, r]
        deviation = math.sqrt(var[q] + eps)
        scale = gamma[q] / deviation
        dgamma[q], dbeta[q], scales[q] = second / deviation, first, scale
        slope = -second / (n * (var[q] + eps)) if through_statistics else 0.0
        level = -first / n - slope * mean[q] if through_statistics else 0.0
        norm[0, q], norm[1, q] = (scale, beta[q] - mean[q] * scale) if relu else (0.0, 1.0)
        norm[2, q], norm[3, q] = slope, level
    return norm, scales, dgamma, dbeta


def through_batch_norm(
    dz: Array, x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """norm, scale, dgamma, dbeta of `gradient_map`."""
    (n, c), mean, var = (x.size // x.shape[1], x.shape[1]), mean.astype(np.float64), var.astype(np.float64)
    norm, dzs, xs = folded(mean, var, gamma, beta, float(eps)), rows(dz), rows(x)
    r = repeats(n, c, dzs, xs)
    wide = mean
    if r > 1:
        dzs, xs = dzs.reshape(n // r, c * r), xs.reshape(n // r, c * r)
        norm, wide = np.tile(norm, r), np.tile(mean, r)
    step = chunk(n // r, c * r)
    sums = np.empty((-(-n // r // step), 2, c * r))
    spread(sums_of_gradient, len(sums), dzs, xs, norm, relu, wide, sums, step)
    return gradient_map(sums, mean, var, gamma, beta, float(eps), n, relu, through_statistics)


@compiled
def upstream(dz, o, y, norm, first, last):
    """The gradient of pixels first … last − 1 behind a batch norm, over its scale: g + y·slope + level; or dz itself,
    where there is none."""
    if len(norm) == 0:
        return dz[first:last]
    zero, dy = y.dtype.type(0), np.empty((last - first, o), y.dtype)
    scale, shift, slope, level = norm[0], norm[1], norm[2], norm[3]
    for m in range(first, last):
        up, values, target = dz[m], y[m], dy[m - first]
        for q in range(o):
            value = values[q]
            g = up[q] if value * scale[q] + shift[q] > zero else zero
            target[q] = g + value * slope[q] + level[q]
    return dy


@compiled
def scaled_upstream(turn, dz, c, x, norm, scale, dx, step):
    """dx = scale · (g + x·slope + level)."""
    block = take(turn)
    while block >= 0:
        first, last = block * step, min(block * step + step, len(x))
        dy = upstream(dz, c, x, norm, first, last)
        for m in range(first, last):
            source, target = dy[m - first], dx[m]
            for q in range(c):
                target[q] = source[q] * scale[q]
        block = take(turn)


def gradient_of(dz: Array, x: Array, norm: Array, scale: Array) -> Array:
    """dx, stored."""
    dx, c = empty_images(np, x.shape, x.dtype), x.shape[1]
    step = chunk(x.size // c, c)
    spread(scaled_upstream, -(-x.size // c // step), rows(dz), c, rows(x), norm, scale, rows(dx), step)
    return dx


def batch_norm_dx(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """One pass for the sums, one for dx"""
    norm, scale, dgamma, dbeta = through_batch_norm(dy, x, mean, var, gamma, beta, eps, relu, through_statistics)
    return gradient_of(dy, x, norm, scale), dgamma, dbeta


def joined(xs: list[Array]) -> Array:
    return xs[0] if len(xs) == 1 else concat(xs)


@compiled
def add_lanes(lanes, scale, out):
    """out = scale · Σ over lanes (lanes, C), in their order."""
    for q in range(len(out)):
        out[q] = lanes[0, q]
    for lane in range(1, len(lanes)):
        source = lanes[lane]
        for q in range(len(out)):
            out[q] += source[q]
    for q in range(len(out)):
        out[q] *= scale


# --- local response normalisation


@compiled
def power(value, beta):
    """value ** −beta; the usual 3/4 by square roots."""
    root = math.sqrt(value)
    return 1 / (root * math.sqrt(root)) if beta == 0.75 else value**-beta


@compiled
def window_sums(values, before, after, out):
    """out[c] = the sum of values[c − before … c + after], clipped at the ends."""
    for q in range(len(out)):
        out[q] = 0
        for j in range(max(0, q - before), min(len(out), q + after + 1)):
            out[q] += values[j]


@compiled
def lrn_rows(turn, dy, x, c, size, alpha, beta, k, y, step):
    """y = x · d^−beta, d = k + alpha / size · Σ x² over neighbours; or, with dy, its gradient

    dx = dy · d^−beta − 2·alpha·beta / size · x · Σ dy·x·d^−(beta + 1), over the mirrored neighbours."""
    squares, d, through = np.empty(c, x.dtype), np.empty(c, x.dtype), np.empty(c, x.dtype)
    backward = len(dy) > 0
    block = take(turn)
    while block >= 0:
        for m in range(block * step, min(block * step + step, len(y))):
            values, target = x[m], y[m]
            for q in range(c):
                squares[q] = values[q] * values[q]
            window_sums(squares, size // 2, (size - 1) // 2, d)
            for q in range(c):
                d[q] = k + alpha / size * d[q]
                factor = power(d[q], beta)
                target[q] = (dy[m, q] if backward else values[q]) * factor
            if backward:
                for q in range(c):
                    squares[q] = target[q] * values[q] / d[q]
                window_sums(squares, (size - 1) // 2, size // 2, through)
                for q in range(c):
                    target[q] -= 2 * alpha * beta / size * values[q] * through[q]
        block = take(turn)


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    return lrn_dx(x[:0], x, size, alpha, beta, k)


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    y, c = empty_images(np, x.shape, x.dtype), x.shape[1]
    step = chunk(x.size // c, c)
    blocks = -(-x.size // c // step)
    spread(lrn_rows, blocks, rows(dy), rows(x), c, size, float(alpha), float(beta), float(k), rows(y), step)
    return y
