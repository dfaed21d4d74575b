"""How the kernels see images, cut their work, and spread it over threads.

Images come as `rows`: a matrix with a row for every pixel, N·H·W of them, whose first C values are the pixel's
channels; it has more where the images are a part of wider ones. A kernel goes through rows in blocks that stay in a
core's second cache. Blocks, and the partial sums over them, follow from the shapes alone: the results are the same
bits for any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from minigrad import threads
from minigrad.layout import Array, Window

BLOCK_BYTES = 1 << 20  # of patches, or of values of elementwise work
ENOUGH = 1 << 22  # multiply-adds that are worth handing to another thread
VALUES = 1 << 14  # of elementwise work, likewise
PIXELS = 48  # that a block of a product should have: every block reads all filters
LANES = 8  # partial sums over blocks


def rows(x: Array) -> Array:
    """(N, C, H, W) as (N·H·W, P), P ≥ C values from one pixel to the next; a copy if it is not channels-last."""
    n, c, h, w = x.shape
    by_pixel = x.transpose(0, 2, 3, 1)
    if by_pixel.flags.c_contiguous and x.flags.writeable:  # a read-only array is another type for Numba
        return by_pixel.reshape(n * h * w, c)
    image, channel, row, column = x.strides
    step = column if w > 1 else row if h > 1 else image if n > 1 else 0
    regular = (w == 1 or column == step) and (h == 1 or row == w * step) and (n == 1 or image == h * w * step)
    if (
        not regular
        or (c > 1 and channel != x.itemsize)
        or step < c * x.itemsize
        or step % x.itemsize
        or not x.flags.writeable
    ):
        return by_pixel.copy("C").reshape(n * h * w, c)
    return np.lib.stride_tricks.as_strided(x, (n * h * w, step // x.itemsize), (step, x.itemsize))


def matrix(x: Array) -> Array:
    """An array as one that a kernel takes: C-contiguous and not read-only."""
    return x if x.flags.c_contiguous and x.flags.writeable else x.copy("C")


@functools.lru_cache(4096)
def flat(window: Window) -> tuple[int, ...]:
    """Its ten numbers: height and width of the input, of the kernel, of stride, padding and output."""
    return sum(window, ())


def rounded(count: int, least: int, most: int) -> int:
    """A number of blocks that 2, 4 and 8 threads share evenly: at least `count` and `least`, at most `most`."""
    count = max(count, least, 1)
    count = 1 << (count - 1).bit_length() if count < LANES else -(-count // LANES) * LANES
    return max(1, min(count, most))


def block_rows(total: int, width: int, bytes_per_pixel: int, multiply_adds: int) -> int:
    """How many rows of `width` pixels make a block, of `total`."""
    pixels = total * width
    least, most = min(LANES, pixels * multiply_adds // ENOUGH), min(total, pixels // PIXELS)
    count = rounded(-(-pixels * bytes_per_pixel // BLOCK_BYTES), least, most)
    return -(-total // count)


def chunk(pixels: int, c: int) -> int:
    """How many pixels make a block of elementwise work."""
    count = rounded(pixels * c // (BLOCK_BYTES // 8), min(LANES, pixels * c // VALUES), pixels)
    return max(1, -(-pixels // count))


def spread(kernel: Callable[..., None], blocks: int, *args: Any) -> None:
    """kernel(turn, *args) on as many threads as there are blocks to take from `turn` (see compiled.take)."""
    turn = np.array((0, blocks))

    def work() -> None:
        try:
            kernel(turn, *args)
        except BaseException:
            turn[0] = blocks  # leave nothing to the others
            raise

    threads.together(work, blocks)
