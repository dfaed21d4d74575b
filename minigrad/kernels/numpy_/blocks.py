"""How the NumPy kernels cut their work: blocks of images or rows, rows made wide, working memory.

The blocks follow from shapes alone, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from minigrad import threads
from minigrad.layout import Array, empty

Item = TypeVar("Item")

# Blocks have two bounds. What one works on, its patches or a handful of operands, must fit a core's share of the last
# cache (8 MB and more on the machines in mind; a core has 1 or 2 of the second cache, where a block would be faster
# still). And a call into NumPy must take much longer than handing over the interpreter lock between two threads, which
# every call does twice: tens of microseconds, in which a core works on a megabyte. Halves of these were slower.
PATCH_BYTES = 1 << 22  # the patches of one block
BLOCK_BYTES = 1 << 20  # one operand of elementwise work
ENOUGH = 1 << 24  # multiply-adds of a product that is worth handing to another thread, however few its bytes
LANES = 8  # partial sums over blocks: a fixed number, whatever the number of threads
WIDE = 4096  # elements a ufunc's inner loop should have; a row of few channels is too short

Block = tuple[slice, slice]  # some images, and some rows of their output
# What a kernel reads its input from: asked for a block, it gives (images, rows, columns, C). `partial(rows, x)` gives a
# part of the array x; `norm.through_batch_norm` makes one that computes the block when it is asked.
Source = Callable[[Block], Array]
Finish = Callable[[int, Array], None]  # takes a block's number and its pixels (rows, C), to read or to overwrite
BYTE = np.dtype(np.int8)


def each(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """work(item) for every item, spread over the threads."""
    # From 2.3 on, NumPy copies a part of an array whose rows are shorter than a buffer into one, which makes a ufunc
    # on it three times slower than on a whole array: unless a row is longer than the buffer, here of 256 values. The
    # size belongs to the context, which `threads.each` hands on.
    before = np.setbufsize(256)
    try:
        threads.each(work, items)
    finally:
        np.setbufsize(before)


def block_bytes(total: int, budget: int) -> int:
    """An eighth of the whole, to keep several cores busy, but between half of the budget and all of it."""
    return min(max(total // 8, budget // 2), budget)


@functools.lru_cache(maxsize=4096)
def cut(
    n: int, size: tuple[int, int], bytes_per_pixel: int, budget: int, least: int = 256, multiply_adds: int = 0
) -> tuple[Block, ...]:
    """Cut n images of (rows, columns) into blocks: some whole images, or bands of one image.

    budget          bytes of a block
    least           pixels of a block, even if they take more than the budget: short products are slow
    multiply_adds   what a pixel costs, if its bytes do not tell
    """
    rows, columns = size
    area = rows * columns
    if not n * area * bytes_per_pixel:
        return ()
    wanted = block_bytes(n * area * bytes_per_pixel, budget) // bytes_per_pixel  # pixels of one block
    if multiply_adds:
        wanted = min(wanted, max(n * area // 8, ENOUGH // multiply_adds))
    wanted = max(wanted, least)
    if wanted >= area:
        return tuple((part, slice(0, rows)) for part in even(n, wanted // area))
    bands = even(rows, max(wanted // columns, 1))
    return tuple((slice(i, i + 1), band) for i in range(n) for band in bands)


def by_image(parts: Iterable[Block]) -> list[list[Block]]:
    """Blocks of the same images together, for kernels whose bands overlap in their result."""
    together: dict[int, list[Block]] = {}
    for part in parts:
        together.setdefault(part[0].start, []).append(part)
    return list(together.values())


def row_blocks(matrix: Array) -> list[slice]:
    """Cut the rows of a pixel matrix into blocks of about BLOCK_BYTES, a whole number of wide rows each."""
    n, c = matrix.shape
    grain = max(WIDE // c, 1)
    wanted = max(block_bytes(matrix.nbytes, BLOCK_BYTES) // (c * matrix.itemsize), 256)
    step = -(-wanted // grain) * grain
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def even(n: int, most: int) -> list[slice]:
    """0 … n in as few parts of at most `most` as possible, of nearly equal size."""
    count = -(-n // most)
    ends = [n * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def repeated(vector: Array) -> Array:
    """A value per channel, repeated for so many pixels that a ufunc's inner loop gets long."""
    return vector[None].repeat(max(WIDE // len(vector), 1), axis=0).ravel()


def widen(matrix: Array, *vectors: Array) -> tuple[Array, ...]:
    """Several pixels seen as one long row, with the `repeated` vectors cut to its length; one pixel a row where the
    matrix is not contiguous."""
    n, c = matrix.shape
    repeat = pixels_in_a_row(n, len(vectors[0]) // c) if matrix.flags.c_contiguous else 1
    return matrix.reshape(n // repeat, repeat * c), *(vector[: repeat * c] for vector in vectors)


@functools.lru_cache(maxsize=4096)
def pixels_in_a_row(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return next(repeat for repeat in range(min(n, most), 0, -1) if n % repeat == 0)


def multiply(a: Array, b: Array, total: Array, *, add: bool = False) -> None:
    """total = a · b; += if `add`."""
    product = np.matmul(a, b, out=scratch("product", total.shape, total.dtype) if add else total)
    if add:
        total += product


def column_sums(matrix: Array, c: int | None = None) -> Array:
    """Σ over rows, as a product with ones: BLAS reads a matrix several times faster than ufunc.reduce does.

    c   the number of channels, where several pixels were seen as one row
    """
    n, width = matrix.shape
    if c is None and matrix.flags.c_contiguous:  # few rows, each long: less to add up one after the other in float32
        repeat = pixels_in_a_row(n, max(WIDE // width, 1))
        matrix = matrix.reshape(n // repeat, repeat * width)
    sums = ones(len(matrix), matrix.dtype) @ matrix
    by_pixel = sums.reshape(-1, c or width)
    return sums if len(by_pixel) == 1 else ones(len(by_pixel), sums.dtype) @ by_pixel


def sum_of_lanes(lanes: Array) -> Array:
    """Σ over the first axis, in its order."""
    flat = lanes.reshape(len(lanes), -1)
    total = np.empty(flat.shape[1], lanes.dtype)
    each(lambda part: flat[:, part].sum(0, out=total[part]), even(len(total), BLOCK_BYTES // (4 * lanes.itemsize)))
    return total.reshape(lanes.shape[1:])


@functools.lru_cache(maxsize=4096)
def ones(n: int, dtype: np.dtype) -> Array:
    return np.ones(n, dtype)


# --- views and masks


def rows(x: Array, part: Block) -> Array:
    """Some rows of some images: (images, rows, columns, C), a view."""
    return x[part[0], :, part[1]].transpose(0, 2, 3, 1)


def matrix(grid: Array) -> Array:
    """(images, rows, columns, C) as (pixels, C)."""
    return grid.reshape(-1, grid.shape[3])


def keep_where(condition: Array, values: Array, out: Array) -> None:
    """`values` where the condition (overwritten) holds, else +0. As bits and a mask: several times faster than
    np.where, and infinities do not turn into NaN as in a product with 0."""
    byte, mask = condition.view(BYTE), scratch("wide mask", condition.shape, integer_of(values))
    np.negative(byte, out=byte)  # all ones where it holds, else 0
    np.copyto(mask, byte)
    np.bitwise_and(values.view(mask.dtype), mask, out=out.view(mask.dtype))


def integer_of(array: Array) -> np.dtype:
    """The signed integer type as wide as the array's floats."""
    return np.dtype(f"i{array.itemsize}")


# --- memory

_memory = threading.local()


def scratch(purpose: str, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """A thread's own working memory for one purpose, uninitialised: still in the cache from the block before.

    It is valid until the same thread asks for the same purpose again, so no two arrays that are in use at once may
    share a purpose. It grows to the largest size asked for, and stays.
    """
    size = math.prod(shape) * dtype.itemsize
    buffer: Array | None = getattr(_memory, purpose, None)
    if buffer is None or buffer.size < size:
        buffer = empty(np, (size,), np.uint8)
        setattr(_memory, purpose, buffer)
    return np.ndarray(shape, dtype, buffer)


def _keep_memory() -> None:
    """Keep freed memory in the process: a training step allocates the same arrays again and again, and fresh
    pages from the kernel cost more than the arithmetic on them. glibc only; elsewhere nothing happens.

    It holds for the whole process, whose memory then shrinks only where the end of the heap is free: after large
    arrays it can stay large. MINIGRAD_KEEP_MEMORY=0 leaves the C library as it is.
    """
    if sys.platform != "linux" or os.environ.get("MINIGRAD_KEEP_MEMORY") == "0":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)


_keep_memory()
