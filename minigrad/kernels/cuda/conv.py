"""Convolution: products of patches and filters by cuBLAS, the patches made by a kernel (conv.cu)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from minigrad.backend import array_module
from minigrad.kernels.cuda.cublas import product
from minigrad.kernels.cuda.launch import fields, launch, matrix, pack, part
from minigrad.kernels.cuda.norm import batch_norm, batch_norm_dx_of_parts, column_sums, statistics
from minigrad.layout import Array, Window, filter_matrix, images, pixels

# A k×k patch matrix is k² times its input, 4 GB for a layer of GoogLeNet at batch 128: blocks of images keep it below
# this, which is far more than it takes to fill a GPU.
PATCH_BYTES = 256 * 2**20


def im2col(x: Array, window: Window) -> Array:
    """The patch matrix (N·OH·OW, KH·KW·C), in each row what one output pixel sees, and zeros: see `patch_length`."""
    if window.is_pointwise:
        return pixels(x)
    (n, c, _, _), (oh, ow), (rows, ld) = x.shape, window.output, matrix(x)
    patches = array_module(x).empty((n * oh * ow, patch_length(c, window, x.itemsize)), x.dtype)
    operands = rows, ld, patches, *patches.shape, c, *fields(window)
    launch("conv", "im2col", x, *patches.shape, *operands, values=pack(rows))
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
    launch("conv", "col2im", dx, *sizes, dpatches, dx, *sizes, *fields(window), values=values)


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
        launch("dense", "add_bias", y, *y.shape, y, row, *y.shape, values=pack(y, row[None]))
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


# ---- Convolution, batch norm and ReLU ----


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
