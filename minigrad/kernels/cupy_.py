"""The kernel table for CuPy arrays: products by cuBLAS (cublas.py), the rest by the CUDA kernels in `cuda/*.cu`.

A kernel's source is read and compiled when it is first called, for the dtype at hand; CuPy keeps the result on disk.
Every kernel computes a matrix: here are its sizes, its arguments and its launch, there is the formula. Operands are
pixel matrices whose rows may be further apart than they are long, so that a part of a concatenation, some columns
of a wider matrix, is read where it lies. Nothing here waits for the device, nothing is added up by atomics, and no
number of blocks depends on the GPU: the same bits in every run.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigrad.backend import array_module, capturing, first_line, module_named
from minigrad.errors import BackendError, ShapeError
from minigrad.kernels.cublas import library, product
from minigrad.layout import Array, Window, empty_images, filter_matrix, images, memory_order, pixels
from minigrad.random import Key, StoredKey, check_repeatable

# A k×k patch matrix is k² times its input, 4 GB for a layer of GoogLeNet at batch 128: blocks of images keep it below
# this, which is far more than it takes to fill a GPU.
PATCH_BYTES = 256 * 2**20
THREADS = 256  # of a block
CHUNK = 4096  # values of a parameter that one block updates
BLOCKS = 4096  # about as many blocks share the rows of a matrix: a few times what a GPU holds at once
PARTS = 1024  # the same where every block leaves a part of a sum for a second kernel to add,
ROWS_EACH = 8  # but no thread adds fewer rows than this
INT = 2**30  # longer arrays are indexed by 64-bit integers, whose divisions are slow
GRID_Y = 65535  # the most blocks side by side


# ---- Launching ----


def check_usable() -> None:
    """Raise BackendError if CuPy is missing, or if CUDA kernels cannot be compiled or cuBLAS not be called."""
    xp: Any = sys.modules.get("cupy") or module_named("cupy")
    if xp.cuda.runtime.is_hip:
        raise BackendError("this CuPy is for AMD's ROCm, and the CUDA kernels are for NVIDIA's GPUs")
    try:
        module(xp, "matrix", "f", "i", 1).get_function("add_bias")
    except Exception as error:
        raise BackendError(f"CUDA kernels cannot be compiled, {first_line(error)}") from None
    library(xp)


@functools.cache
def module(xp: Any, source: str, dtype: str, index: str, values: int) -> Any:
    """The kernels of cuda/`source`.cu for one dtype, one index type and one number of values in a Pack."""
    return xp.RawModule(code=cuda_source(dtype, index, values, source), options=("--std=c++17",))


def cuda_source(dtype: str, index: str, values: int, *sources: str) -> str:
    """What is compiled: the choices that common.h names, common.h, and the sources. Types are NumPy's characters."""
    types = {"f": "float", "d": "double", "i": "int", "q": "long long"}
    choices = f"typedef {types[dtype]} T;\ntypedef {types[index]} Index;\n"
    choices += f"constexpr int V = {values}, THREADS = {THREADS};\n"
    parts = [choices]
    for name in ("common.h", *(f"{source}.cu" for source in sources)):
        parts.append(f'#line 1 "{name}"\n' + (Path(__file__).with_name("cuda") / name).read_text(encoding="utf-8"))
    return "".join(parts)


def block_shape(columns: int) -> tuple[int, int]:
    """A block's threads across the columns and down the rows: many neighbours where no more than an eighth of the
    threads is idle, few idle ones elsewhere; powers of two."""
    if columns < 8:
        across = 1 << (columns - 1).bit_length()
    else:
        across = min((32, 16, 8), key=lambda width: max(1.125 * columns, -(-columns // width) * width))
    return across, THREADS // across


@functools.lru_cache(4096)
def plan(
    xp: Any, source: str, kernel: str, dtype: str, index: str, rows: int, columns: int, values: int, parts: int | None
) -> tuple[Any, tuple[int, int], tuple[int, int]]:
    """The kernel, the blocks down the rows and across the columns, and the threads of a block across and down."""
    width = columns // values
    across, down = block_shape(min(4, width) if rows == parts == 1 else width)  # a single row: a total of many parts
    beside = -(-width // across)
    if beside > GRID_Y:
        raise ShapeError(
            f"{kernel} got a matrix of {columns} columns, the GPU's grid ends at {GRID_Y * across * values}"
        )
    if parts is None:
        parts = max(1, min(-(-rows // down), BLOCKS // beside))
    function = module(xp, source, dtype, index, values).get_function(kernel)
    return function, (parts, beside), (across, down)


def launch(
    source: str,
    kernel: str,
    like: Array,
    rows: int,
    columns: int,
    *args: Any,
    values: int = 1,
    parts: int | None = None,
) -> None:
    """Start a kernel on a matrix of this size, for the dtype of `like`.

    values   in a Pack: so many columns belong to one thread
    parts    how many blocks share the rows; as many as keep the GPU busy unless given

    Integers and bools, Python's or NumPy's, become the kernel's Index, Python's floats are double already; anything
    else would reach the kernel as wrong bits, without an error. Raises ShapeError if the matrix has too many columns.
    """
    given, integers, longest = list(args), [], 0
    for i, a in enumerate(args):
        if isinstance(a, (int, np.integer, np.bool_)):
            integers.append(i)
        elif not isinstance(a, float):
            longest = max(longest, a.shape[0] * abs(a.strides[0]) // a.itemsize)
    index, integer = ("i", np.int32) if longest < INT else ("q", np.int64)
    for i in integers:
        given[i] = integer(given[i])
    function, grid, block = plan(
        array_module(like), source, kernel, like.dtype.char, index, rows, columns, values, parts
    )
    function(grid, block, tuple(given))


def matrix(x: Array) -> tuple[Array, int]:
    """The pixel matrix of images, and how many values lie between the starts of its rows.

    A view where the channels of a pixel are neighbours, as in any columns of a pixel matrix.
    """
    rows = pixels(x)
    (down, across), itemsize = rows.strides, rows.itemsize
    if (across != itemsize and rows.shape[1] > 1) or down % itemsize:
        rows = array_module(x).ascontiguousarray(rows)
        down = rows.strides[0]
    return rows, rows.shape[1] if len(rows) == 1 else down // itemsize


def empty_matrix(x: Array) -> Array:
    """Room for a pixel matrix of the size of x."""
    n, c, h, w = x.shape
    return array_module(x).empty((n * h * w, c), x.dtype)


def pack(*matrices: Array) -> int:
    """How many values a thread can move at once: 16 bytes if the rows of all these matrices start at such borders."""
    values = 16 // matrices[0].itemsize
    fits = all(
        m.data.ptr % 16 == 0 and m.shape[1] % values == 0 and (len(m) == 1 or m.strides[0] % 16 == 0) for m in matrices
    )
    return values if fits else 1


def side_by_side(xs: list[Array]) -> list[tuple[Array, slice]]:
    """Images with the channels that are theirs in the concatenation of all."""
    ends = itertools.accumulate(x.shape[1] for x in xs)
    return [(x, slice(end - x.shape[1], end)) for x, end in zip(xs, ends, strict=True)]


def part(x: Array, own: slice) -> Array:
    """Some columns, or all of them without the time that a view takes."""
    return x if own.stop - own.start == x.shape[-1] else x[..., own]


@functools.lru_cache(4096)
def fields(window: Window) -> tuple[int, ...]:
    """A window as the kernels take it."""
    return tuple(itertools.chain.from_iterable(window))


# ---- Convolution ----


def im2col(x: Array, window: Window) -> Array:
    """The patch matrix (N·OH·OW, KH·KW·C), in each row what one output pixel sees, and zeros: see `patch_length`."""
    if window.is_pointwise:
        return pixels(x)
    (n, c, _, _), (oh, ow), (rows, ld) = x.shape, window.output, matrix(x)
    patches = array_module(x).empty((n * oh * ow, patch_length(c, window, x.itemsize)), x.dtype)
    operands = rows, ld, patches, *patches.shape, c, *fields(window)
    launch("convolution", "im2col", x, *patches.shape, *operands, values=pack(rows))
    return patches


def patch_length(channels: int, window: Window, itemsize: int) -> int:
    """KH·KW·C, or the next multiple of 16 bytes: for rows that begin elsewhere cuBLAS has slower kernels alone."""
    values, length = 1 if window.is_pointwise else 16 // itemsize, math.prod(window.kernel) * channels
    return -(-length // values) * values


def with_zeros(filters: Array, length: int) -> Array:
    """The filters (O, KH·KW·C) with zeros where patches of this length have theirs."""
    if filters.shape[1] == length:
        return filters
    longer = array_module(filters).zeros((len(filters), length), filters.dtype)
    longer[:, : filters.shape[1]] = filters
    return longer


def col2im(dpatches: Array, dx: Array, window: Window) -> None:
    """Its transpose: every input pixel gathers its cells from the patches that it is in. dx (N·H·W, C)."""
    sizes, values = dx.shape, pack(dx)
    launch("convolution", "col2im", dx, *sizes, dpatches, dx, *sizes, *fields(window), values=values)


def blocks(n: int, channels: int, window: Window, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """The batch in blocks whose patch matrix stays below PATCH_BYTES: (its images, its rows of output pixels)."""
    oh, ow = window.output
    bytes_of_image = oh * ow * patch_length(channels, window, itemsize) * itemsize
    step = max(1, n if window.is_pointwise else PATCH_BYTES // bytes_of_image)
    for first in range(0, n, step):
        last = min(n, first + step)
        yield slice(first, last), slice(first * oh * ow, last * oh * ow)


def correlate(x: Array, weight: Array, window: Window) -> Array:
    """patches @ filtersᵀ, (N·OH·OW, O)"""
    (n, c, _, _), (oh, ow) = x.shape, window.output
    filters = with_zeros(filter_matrix(weight), patch_length(c, window, x.itemsize)).T  # (KH·KW·C, O)
    y = array_module(x).empty((n * oh * ow, weight.shape[0]), x.dtype)
    for batch, rows in blocks(n, c, window, x.dtype.itemsize):
        product(im2col(x[batch], window), filters, y[rows])
    return y


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """patches @ filtersᵀ + bias"""
    y = correlate(x, weight, window)
    if bias is not None:
        row = array_module(bias).ascontiguousarray(bias)
        launch("matrix", "add_bias", y, *y.shape, y, row, *y.shape, values=pack(y, row[None]))
    return images(y, x.shape[0], *window.output)


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    """dy @ filters gives the gradient of every patch; every pixel gathers its part of them."""
    xp, dy_rows, filters = array_module(dy), pixels(dy), filter_matrix(weight)
    n, c, (h, w) = dy.shape[0], weight.shape[1], window.input
    dx = xp.empty((n * h * w, c), dy.dtype)
    for batch, rows in blocks(n, c, window, dy.dtype.itemsize):
        if window.is_pointwise:
            product(dy_rows, filters, dx)
        else:
            dpatches = product(dy_rows[rows], filters, xp.empty((rows.stop - rows.start, filters.shape[1]), dy.dtype))
            col2im(dpatches, dx[batch.start * h * w : batch.stop * h * w], window)
    return images(dx, n, h, w)


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dw = dyᵀ @ patches, db = column sums of dy"""
    xp, dy_rows = array_module(x), pixels(dy)
    (n, c, _, _), (kh, kw), o = x.shape, window.kernel, dy.shape[1]
    length = patch_length(c, window, x.itemsize)
    dw = xp.empty((o, length), x.dtype) if n else xp.zeros((o, length), x.dtype)
    for batch, rows in blocks(n, c, window, x.dtype.itemsize):
        product(dy_rows[rows].T, im2col(x[batch], window), dw, accumulate=batch.start > 0)
    dw = xp.ascontiguousarray(part(dw, slice(0, kh * kw * c)))  # without the zeros
    return images(dw, o, kh, kw), column_sums(dy) if with_bias else None


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients that are needed."""
    dx = conv2d_dx(dy, weight, window) if needs_dx else None
    return dx, *(conv2d_dw(dy, x, window, with_bias) if needs_dw or with_bias else (None, None))


# ---- Sums over the pixels, in two kernels: the parts of every block of rows, then their totals ----


def empty_parts(xp: Any, m: int, sums: int, channels: int, width: int) -> Array:
    """Room for (blocks of rows, sums, channels) in float64, for so many blocks as keep the GPU busy.

    m, width   rows, and threads across: the least of them where several launches share the room
    """
    across, down = block_shape(width)
    count = max(1, min(m // (ROWS_EACH * down), PARTS // -(-width // across)))
    return xp.empty((count, sums, channels), np.float64)


def column_sums(x: Array) -> Array:
    """Σ over the pixels of every channel: added in float64, returned in the dtype of x."""
    xp, (rows, ld), channels = array_module(x), matrix(x), x.shape[1]
    values, sums = pack(rows), xp.empty(channels, x.dtype)
    parts = empty_parts(xp, len(rows), 1, channels, channels // values)
    operands = rows, ld, parts, *rows.shape
    launch("matrix", "column_sums_parts", x, *rows.shape, *operands, parts=len(parts), values=values)
    launch("matrix", "column_sums", x, 1, channels, parts, len(parts), sums, channels, parts=1)
    return sums


def statistics(x: Array) -> tuple[Array, Array]:
    """Sums of what is left of x, and of its square, after each channel's first value is taken off."""
    xp, (rows, ld) = array_module(x), matrix(x)
    (m, channels), values = rows.shape, pack(rows)
    parts, (mean, var) = empty_parts(xp, m, 2, channels, channels // values), xp.empty((2, channels), np.float64)
    operands = rows, ld, parts, m, channels
    launch("normalisation", "statistics_parts", x, m, channels, *operands, parts=len(parts), values=values)
    launch("normalisation", "statistics", x, 1, channels, parts, len(parts), rows, mean, var, m, channels, parts=1)
    return mean, var


# ---- Batch norm ----


def move_running(running_mean: Array, running_var: Array, mean: Array, var: Array, n: int, momentum: float) -> None:
    """One launch."""
    numbers, c, xp = (n / (n - 1), float(momentum)), len(mean), array_module(mean)
    own = running_mean, running_var
    if all(x.flags.c_contiguous and x.dtype == running_mean.dtype and x.dtype.char in "fd" for x in own):
        moved = own
    else:  # as somebody has made them
        moved = xp.ascontiguousarray(running_mean, np.float64), xp.ascontiguousarray(running_var, np.float64)
    launch("normalisation", "move_running", moved[0], c, 1, *moved, mean, var, *numbers, c)
    for x, new in zip(own, moved, strict=True):
        if new is not x:
            x[...] = new


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """One pass."""
    rows, ld, y = *matrix(x), empty_matrix(x)
    channels = of_channels(mean, var, gamma, beta)
    operands = rows, ld, *channels, float(eps), relu, y, *rows.shape
    launch("normalisation", "batch_norm", x, *rows.shape, *operands, values=pack(rows, y))
    return images(y, x.shape[0], *x.shape[2:])


def batch_norm_dx(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:
    """Two passes: dgamma and dbeta, then dx."""
    return batch_norm_dx_of_parts([dy], x, mean, var, gamma, beta, eps, relu, through_statistics)


def batch_norm_dx_of_parts(
    dys: list[Array],
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:
    """The same where dy comes as columns that lie apart: each part is read where it is."""
    xp, (n, channels, h, w), dtype = array_module(x), x.shape, x.dtype
    m, numbers, sums = n * h * w, of_channels(mean, var, gamma, beta), xp.empty((2, channels), np.float64)
    dx, (dbeta, dgamma) = xp.empty((m, channels), dtype), xp.empty((2, channels), dtype)
    (rows, ld), operands = matrix(x), []
    for dy, own in side_by_side(dys):
        (dy_rows, dy_ld), x_rows, dx_rows = matrix(dy), part(rows, own), part(dx, own)
        given = dy_rows, dy_ld, x_rows, ld, *(part(a, own) for a in numbers), float(eps), relu
        operands.append((own, (m, dy.shape[1]), pack(dy_rows, x_rows, dx_rows), given, dx_rows))
    parts = empty_parts(xp, m, 2, channels, min(size[1] // values for _, size, values, _, _ in operands))
    count = len(parts)
    for own, size, values, given, _ in operands:
        into = part(parts, own), channels, *size
        launch("normalisation", "batch_norm_sums_parts", x, *size, *given, *into, parts=count, values=values)
    results = count, sums, dbeta, dgamma, channels
    launch("normalisation", "batch_norm_sums", x, 1, channels, parts, *results, parts=1)
    for own, size, values, given, dx_rows in operands:
        using = through_statistics, part(sums, own), dx_rows, channels, *size
        launch("normalisation", "batch_norm_dx", x, *size, *given, *using, values=values)
    return images(dx, n, h, w), dgamma, dbeta


def of_channels(mean: Array, var: Array, gamma: Array, beta: Array) -> list[Array]:
    """(C,) each, their values side by side; means and variances in float64: in evaluation they come as stored."""
    dtypes = (np.float64, np.float64, gamma.dtype, beta.dtype)
    xp = array_module(mean)
    return [xp.ascontiguousarray(a, dtype) for a, dtype in zip((mean, var, gamma, beta), dtypes, strict=True)]


def conv_bn_relu(
    x: Array, weight: Array, window: Window, mean: Array, var: Array, gamma: Array, beta: Array, eps: float
) -> Array:
    """One after the other: with batch norm in the filters its shift would still be a pass, and they more launches"""
    return batch_norm(conv2d(x, weight, None, window), mean, var, gamma, beta, eps, True)


def conv2d_statistics(x: Array, weight: Array, window: Window) -> tuple[Array, Array, Array]:
    """One after the other"""
    y = conv2d(x, weight, None, window)
    return y, *statistics(y)


def conv_bn_relu_backward(
    dzs: list[Array], x: Array, weight: Array, window: Window, y: Array, mean: Array, var: Array, gamma: Array,
    beta: Array, eps: float, needs_dx: bool,
) -> tuple[Array | None, Array | None, Array, Array]:  # fmt: skip
    """Back through ReLU and batch norm, then through the convolution"""
    dy, dgamma, dbeta = batch_norm_dx_of_parts(dzs, y, mean, var, gamma, beta, eps, True, True)
    dx, dw, _ = conv2d_backward(dy, x, weight, window, needs_dx, True, False)
    return dx, dw, dgamma, dbeta


# ---- Pooling ----


def pool(kernel: str, x: Array, size: tuple[int, int], window: Window, *options: Any, packed: bool = False) -> Array:
    """Launch a kernel that takes images and a window, and makes images of another size."""
    (rows, ld), (n, c, _, _) = matrix(x), x.shape
    y = array_module(x).empty((n * size[0] * size[1], c), x.dtype)
    values = pack(rows) if packed else 1
    launch("pooling", kernel, x, *y.shape, rows, ld, *options, y, *y.shape, *fields(window), values=values)
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
    launch("pooling", "max_along", x, rows, inner, x, ld, best, first, rows, inner, *along, values=values)
    return best, first


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    """dy goes to the winning row, then to the winning column in it."""
    (n, c, _, ow), (h, w), (across, down) = dy.shape, window.input, map(pixels, winners)
    d_across = hand_along(array_module(dy).ascontiguousarray(pixels(dy)), down, window, 0, n * h, ow * c)
    return images(hand_along(d_across, across, window, 1, n * h * w, c), n, h, w)


def hand_along(dy: Array, first: Array, window: Window, axis: int, rows: int, inner: int) -> Array:
    """The transpose of `max_along`."""
    dx, along = array_module(dy).empty((rows, inner), dy.dtype), [pair[axis] for pair in window]
    launch("pooling", "hand_along", dy, rows, inner, dy, first, dx, rows, inner, *along, values=pack(dy, dx))
    return dx


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    """One pass."""
    return pool("avg_pool", x, window.output, window, count_padding)


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    """One pass: every pixel gathers its shares."""
    return pool("avg_pool_dx", dy, window.input, window, count_padding)


# ---- Local response normalisation ----


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """One pass."""
    rows, ld, y = *matrix(x), empty_matrix(x)
    constants = size, float(alpha), float(beta), float(k)
    launch("normalisation", "lrn", x, *rows.shape, rows, ld, *constants, y, *rows.shape)
    return images(y, x.shape[0], *x.shape[2:])


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """One pass; every neighbour's base is worked out again, which costs less than to store it."""
    rows, ld, dx = *matrix(x), empty_matrix(x)
    constants = size, float(alpha), float(beta), float(k)
    launch("normalisation", "lrn_dx", x, *rows.shape, *matrix(dy), rows, ld, *constants, dx, *rows.shape)
    return images(dx, x.shape[0], *x.shape[2:])


# ---- The rest ----


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    """A block of threads for every row, in float64."""
    (rows, ld), xp = matrix(logits[:, :, None, None]), array_module(logits)
    labels = xp.ascontiguousarray(labels, np.int64)
    results = xp.empty(len(rows), logits.dtype), xp.empty(rows.shape, logits.dtype)
    operands = rows, ld, labels, float(smoothing), *results, *rows.shape
    launch("loss", "cross_entropy", logits, len(rows), 1, *operands, parts=min(len(rows), BLOCKS))
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
        launch("matrix", "copy_columns", x, *rows.shape, rows, ld, columns, y.shape[1], *rows.shape, values=values)
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
    launch("dropout", "dropout", x, *y.shape, given, ld, stream, numbers, rows is not None, float(p), y, *sizes)
    return images(y, n, *grid.shape[2:]).reshape(x.shape)


# ---- Pictures: not in the table, as the host does better with slices of one picture at a time ----


def augment(pictures: Array, changes: Array, side: int, table: Array) -> Array:
    """Take pictures into a batch: cropped, mirrored, a square cut out, normalised, in one pass.

    pictures  (P, H, W, C) uint8
    changes   (N, 6) int32, for each picture of the batch: its number in `pictures`; pixels down and right by which its
              crop is shifted, black outside; 1 to mirror that left and right; top and left of the square
    side      of the square, pixels; 0: none
    table     (257, C): what every level becomes, and in the last row what is put into the square
    returns   (N, C, H, W) of the table's dtype
    """
    n, (_, h, w, c) = len(changes), pictures.shape
    xp = array_module(table)
    pictures, y = xp.ascontiguousarray(pictures), xp.empty((n * h, w * c), table.dtype)
    launch("pictures", "augment", table, *y.shape, pictures, changes, side, table, y, n * h, h, w, c)
    return images(y, n, h, w)


# ---- All parameters of a model at once ----


class Together:
    """One launch of a kernel of cuda/optim.cu over many rows of arrays, however many and however large.

    kernel   its name
    firsts   the first array of each row: dtype and sizes are those of the launch, addresses may change

    The kernel reads from tables on the device where the arrays of a row are, and its numbers. What has changed in them
    is written at a launch; but not while a CUDA graph is captured, which would write the same ever after. So whoever
    has captured a launch says what is new with `place` and `tell`, and calls `upload` before each replay.
    """

    def __init__(self, kernel: str, firsts: Sequence[Array]):
        self.kernel, self.like, self.sizes = kernel, firsts[0], [array.size for array in firsts]
        cut = [(i, j, min(size, j + CHUNK)) for i, size in enumerate(self.sizes) for j in range(0, size, CHUNK)]
        self.chunks = array_module(self.like).asarray(np.array(cut, np.int64).reshape(-1, 3))  # (blocks, 3)
        self.placed: tuple[list[int], np.ndarray | None] = [], None  # rows told of, and the table of addresses
        self.told: np.ndarray | None = None  # the table of numbers
        self.known: dict[str, np.ndarray] = {}  # both as they were written; none is ever changed, but replaced
        self.addresses: Array = None  # (rows, arrays) int64, on the device
        self.numbers: Array = None  # (rows, numbers) float64, on the device

    def takes(self, row: int, *arrays: Array | None) -> bool:
        """Whether these arrays can stand in a row: one value after the other, in the same order in all of them."""
        given = [array for array in arrays if array is not None]
        orders = {memory_order(a.shape, a.strides, a.itemsize) for a in given}
        kind = type(self.like), self.like.dtype, given[0].shape
        alike = all((type(a), a.dtype, a.shape) == kind for a in given)
        return alike and len(orders) == 1 and None not in orders and given[0].size == self.sizes[row]

    def place(self, rows: Mapping[int, Sequence[Array | None]]) -> None:
        """Tell where arrays are, of one size in a row, the first never None; a row not told of is left alone."""
        addresses = {i: [0 if array is None else array.data.ptr for array in arrays] for i, arrays in rows.items()}
        self.placed = list(rows), self._table(addresses, self.placed[1], np.int64)

    def tell(self, rows: Mapping[int, Sequence[float]]) -> None:
        """Tell the numbers of rows."""
        self.told = self._table(rows, self.told, np.float64)

    def _table(self, rows: Mapping[int, Sequence[float]], before: np.ndarray | None, dtype: Any) -> np.ndarray:
        width = len(next(iter(rows.values()))) if before is None else before.shape[1]
        table = np.zeros((len(self.sizes), width), dtype)
        for i, values in rows.items():
            table[i] = values
        return table

    def upload(self) -> None:
        """Write what has changed to the tables on the device, always in the same memory: a graph reads it there."""
        for name, table in (("addresses", self.placed[1]), ("numbers", self.told)):
            assert table is not None
            known = self.known.get(name)
            if known is None:
                setattr(self, name, array_module(self.like).empty(table.shape, table.dtype))
            elif table is known or np.array_equal(table, known):
                continue
            getattr(self, name).set(table)  # it need not stay: it has been copied when this returns
            self.known[name] = table

    def load(self) -> None:
        """What the first launch does besides, and a capture cannot: compile the kernel, and write the tables."""
        if blocks := len(self.chunks):
            plan(array_module(self.like), "optim", self.kernel, self.like.dtype.char, "i", blocks, 1, 1, blocks)
        self.upload()

    def launch(self, kernel: str = "", *more: Any) -> None:
        """Start the kernel, or another one, on what was told last; `more` is what else it takes."""
        if not capturing(array_module(self.like)):
            self.upload()
        tables = self.chunks, self.addresses, self.addresses.shape[1], self.numbers, self.numbers.shape[1]
        if blocks := len(self.chunks):
            launch("optim", kernel or self.kernel, self.like, blocks, 1, *tables, *more, parts=blocks)


def clip(together: Together, gradients: list[Array], into: list[Array], max_norm: float) -> Array:
    """Write the gradients, scaled to a joint norm of at most max_norm, into arrays like them; return the norm, (1,)."""
    together.place(dict(enumerate(zip(into, gradients, strict=True))))
    together.tell(dict.fromkeys(range(len(into)), (max_norm,)))
    xp, blocks = array_module(into[0]), len(together.chunks)
    squares, norm = xp.empty(blocks, np.float64), xp.zeros(1, np.float64)
    together.launch("squares", squares)
    together.launch("clip", squares, blocks, norm)
    return norm
