"""Pooling: every output pixel, or backward every input pixel, is one thread's (pool.cu)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minigrad.backend import array_module
from minigrad.kernels.cuda.launch import fields, launch, matrix, pack
from minigrad.layout import Array, Window, images, pixels


def pool(kernel: str, x: Array, size: tuple[int, int], window: Window, *options: Any, packed: bool = False) -> Array:
    """Launch a kernel that takes images and a window, and makes images of another size."""
    (rows, ld), (n, c, _, _) = matrix(x), x.shape
    y = array_module(x).empty((n * size[0] * size[1], c), x.dtype)
    values = pack(rows) if packed else 1
    launch("pool", kernel, x, *y.shape, rows, ld, *options, y, *y.shape, *fields(window), values=values)
    return images(y, n, *size)


def max_pool(x: Array, window: Window) -> Array:
    """One pass over x, nothing else is kept."""
    return pool("max_pool", x, window.output, window, packed=True)


def max_pool_winners(x: Array, window: Window) -> tuple[Array, list[Array]]:
    """The maximum across the columns, then down the rows, and which cell had it first."""
    (rows, ld), (n, c, h, _), (oh, ow) = matrix(x), x.shape, window.output
    best, across = max_along(rows, ld, c, window, 1, n * h * ow)
    y, down = max_along(best, ow * c, ow * c, window, 0, n * oh)
    return images(y, n, oh, ow), [images(across, n, h, ow), images(down, n, oh, ow)]


def max_along(x: Array, ld: int, inner: int, window: Window, axis: int, rows: int) -> tuple[Array, Array]:
    """The maximum of every window along one axis of a grid, and the number of the cell that has it first."""
    xp, along = array_module(x), [pair[axis] for pair in window]
    best, first = xp.empty((rows, inner), x.dtype), xp.empty((rows, inner), np.int8)
    values = pack(x, best)
    launch("pool", "max_along", x, rows, inner, x, ld, best, first, rows, inner, *along, values=values)
    return best, first


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    """dy goes to the winning row, then to the winning column in it."""
    (n, c, _, ow), (h, w), (across, down) = dy.shape, window.input, map(pixels, winners)
    d_across = hand_along(array_module(dy).ascontiguousarray(pixels(dy)), down, window, 0, n * h, ow * c)
    return images(hand_along(d_across, across, window, 1, n * h * w, c), n, h, w)


def hand_along(dy: Array, first: Array, window: Window, axis: int, rows: int, inner: int) -> Array:
    """The transpose of `max_along`."""
    dx, along = array_module(dy).empty((rows, inner), dy.dtype), [pair[axis] for pair in window]
    launch("pool", "hand_along", dy, rows, inner, dy, first, dx, rows, inner, *along, values=pack(dy, dx))
    return dx


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    """One pass."""
    return pool("avg_pool", x, window.output, window, count_padding)


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    """One pass: every pixel gathers its shares."""
    return pool("avg_pool_dx", dy, window.input, window, count_padding)
