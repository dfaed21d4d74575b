"""Pooling: the maximum and the mean of windows. Forward each output pixel looks at its window; backward each input
pixel gathers from the windows that it is in."""

from __future__ import annotations

import numpy as np

from minigrad.kernels.loops.blocks import flat, rounded, rows, spread
from minigrad.kernels.loops.compiled import compiled, take
from minigrad.layout import Array, Window, empty, empty_images

BLOCK = 1 << 15  # values of one block


def block_of(total: int, values: int) -> int:
    """How many rows of pixels make a block, of `total`, if each has so many values."""
    return -(-total // rounded(total * values // BLOCK, 1, total))


@compiled
def maxima(turn, x, c, y, winners, window, step):
    """The maximum of each window (NaN if there is one), and the number of the first cell that has it."""
    h, w, kh, kw, sh, sw, ph, pw, oh, ow = window
    block = take(turn)
    while block >= 0:
        for m in range(block * step * ow, min(block * step + step, len(y) // ow) * ow):
            i, top, left, begun = m // (oh * ow), m // ow % oh * sh - ph, m % ow * sw - pw, False
            out, best = y[m], winners[m % len(winners)]
            for u in range(max(0, -top), min(kh, h - top)):
                for v in range(max(0, -left), min(kw, w - left)):
                    cell, number = x[(i * h + top + u) * w + left + v], best.dtype.type(u * kw + v)
                    for q in range(c):
                        larger = not begun or cell[q] > out[q] or cell[q] != cell[q]
                        out[q] = cell[q] if larger else out[q]
                        if len(best):
                            best[q] = number if larger else best[q]
                    begun = True
        block = take(turn)


@compiled
def maxima_dx(turn, dy, c, winners, dx, window, step):
    """Every pixel gathers from the windows that it won."""
    h, w, kh, kw, sh, sw, ph, pw, oh, ow = window
    zero = dx.dtype.type(0)
    block = take(turn)
    while block >= 0:
        for m in range(block * step * w, min(block * step + step, len(dx) // w) * w):
            i, a, b, total = m // (h * w), m // w % h + ph, m % w + pw, dx[m]
            total[:] = zero
            for j in range(max(0, -(-(a - kh + 1) // sh)), min(oh, a // sh + 1)):
                for k in range(max(0, -(-(b - kw + 1) // sw)), min(ow, b // sw + 1)):
                    number = winners.dtype.type((a - j * sh) * kw + b - k * sw)
                    up, best = dy[(i * oh + j) * ow + k], winners[(i * oh + j) * ow + k]
                    for q in range(c):
                        total[q] += up[q] if best[q] == number else zero
        block = take(turn)


def pooled(x: Array, window: Window, winners: Array) -> Array:
    n, c, (oh, ow) = len(x), x.shape[1], window.output
    y, step = empty_images(np, (n, c, oh, ow), x.dtype), block_of(n * oh, ow * c)
    spread(maxima, -(-n * oh // step), rows(x), c, rows(y), winners, flat(window), step)
    return y


def max_pool(x: Array, window: Window) -> Array:
    return pooled(x, window, np.empty((1, 0), np.int8))


def max_pool_winners(x: Array, window: Window) -> tuple[Array, Array]:
    (kh, kw), (oh, ow) = window.kernel, window.output
    winners = empty(np, (len(x) * oh * ow, x.shape[1]), np.int8 if kh * kw < 128 else np.int16)
    return pooled(x, window, winners), winners


def max_pool_dx(dy: Array, winners: Array, window: Window) -> Array:
    n, c, (h, w) = len(dy), dy.shape[1], window.input
    dx, step = empty_images(np, (n, c, h, w), dy.dtype), block_of(n * h, w * c)
    spread(maxima_dx, -(-n * h // step), rows(dy), c, winners, rows(dx), flat(window), step)
    return dx


@compiled
def share(window, count_padding, j, k):
    """1 / the number of cells that window (j, k) averages over: those in the image, or in the padded image."""
    h, w, kh, kw, sh, sw, ph, pw, _, _ = window
    top, left = j * sh - ph, k * sw - pw
    if count_padding:
        return 1 / (min(kh, h + ph - top) * min(kw, w + pw - left))
    return 1 / ((min(kh, h - top) - max(0, -top)) * (min(kw, w - left) - max(0, -left)))


@compiled
def means(turn, x, c, y, count_padding, window, step):
    """The sum over each window times its share."""
    h, w, kh, kw, sh, sw, ph, pw, oh, ow = window
    block = take(turn)
    while block >= 0:
        for m in range(block * step * ow, min(block * step + step, len(y) // ow) * ow):
            i, j, k, out = m // (oh * ow), m // ow % oh, m % ow, y[m]
            top, left, factor = j * sh - ph, k * sw - pw, y.dtype.type(share(window, count_padding, j, k))
            out[:] = 0
            for u in range(max(0, -top), min(kh, h - top)):
                for v in range(max(0, -left), min(kw, w - left)):
                    cell = x[(i * h + top + u) * w + left + v]
                    for q in range(c):
                        out[q] += cell[q]
            for q in range(c):
                out[q] *= factor
        block = take(turn)


@compiled
def means_dx(turn, dy, c, dx, count_padding, window, step):
    """Every pixel gathers its share from the windows that it is in."""
    h, w, kh, kw, sh, sw, ph, pw, oh, ow = window
    block = take(turn)
    while block >= 0:
        for m in range(block * step * w, min(block * step + step, len(dx) // w) * w):
            i, a, b, total = m // (h * w), m // w % h + ph, m % w + pw, dx[m]
            total[:] = 0
            for j in range(max(0, -(-(a - kh + 1) // sh)), min(oh, a // sh + 1)):
                for k in range(max(0, -(-(b - kw + 1) // sw)), min(ow, b // sw + 1)):
                    up, factor = dy[(i * oh + j) * ow + k], dx.dtype.type(share(window, count_padding, j, k))
                    for q in range(c):
                        total[q] += up[q] * factor
        block = take(turn)


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    n, c, (oh, ow) = len(x), x.shape[1], window.output
    y, step = empty_images(np, (n, c, oh, ow), x.dtype), block_of(n * oh, ow * c)
    spread(means, -(-n * oh // step), rows(x), c, rows(y), count_padding, flat(window), step)
    return y


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    n, c, (h, w) = len(dy), dy.shape[1], window.input
    dx, step = empty_images(np, (n, c, h, w), dy.dtype), block_of(n * h, w * c)
    spread(means_dx, -(-n * h // step), rows(dy), c, rows(dx), count_padding, flat(window), step)
    return dx
