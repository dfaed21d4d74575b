"""Convolution: im2col and a matrix product, block by block.

Read `blocks`, `patches` and `correlate` first, then `both_gradients`. Forward is `correlate`, patches of x times
filters, or `winograd` where it pays: 3×3 and 5×5 at stride 1. Backward goes one of three ways:

    both_gradients    stride 1: patches of dy, which give dx and dw at once
    input_gradient, filter_gradient    other strides, or if only one is wanted: by the book, dx = col2im(dy · filters)
                      and dw = patches of xᵀ · dy
    winograd          as forward

A block and its patches stay in the cache. They are read from a `Source`, which may compute them there and then: the
gradient that comes through a batch norm is worked out where patches are made of it (`conv_bn_relu_backward`), and never
stored. `finish` sees a block of the result before it leaves the cache, for its statistics, its batch norm or
its ReLU.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from minigrad.kernels.numpy_ import winograd
from minigrad.kernels.numpy_.blocks import (
    ENOUGH,
    LANES,
    PATCH_BYTES,
    Block,
    Finish,
    Source,
    by_image,
    column_sums,
    cut,
    each,
    even,
    matrix,
    multiply,
    repeated,
    rows,
    scratch,
    sum_of_lanes,
    widen,
)
from minigrad.kernels.numpy_.norm import Moments, merged, moments, scale_and_shift, through_batch_norm
from minigrad.kernels.numpy_.patches import add_inside, col2im, im2col
from minigrad.layout import Array, Window, empty_images, filter_matrix, pixels


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """Patches times filters, plus bias"""
    return convolved(x, weight, bias, window)


def convolved(x: Array, weight: Array, bias: Array | None, window: Window, finish: Finish | None = None) -> Array:
    """The convolution, by the way that its sizes favour."""
    if winograd.pays(x.shape, len(weight), window):
        return winograd.conv2d(x, weight, bias, window, finish)
    return correlate(partial(rows, x), len(x), x.dtype, filter_columns(weight), bias, window, finish)


def correlate(
    source: Source, n: int, dtype: np.dtype, filters: Array, bias: Array | None, window: Window,
    finish: Finish | None = None,
) -> Array:  # fmt: skip
    """The images (N, O, OH, OW) of the patches of `source` times filters (KH·KW·C, O)."""
    y = empty_images(np, (n, filters.shape[1], *window.output), dtype)
    parts = cut(n, window.output, filters.itemsize * len(filters), PATCH_BYTES, multiply_adds=filters.size)

    def block(i: int) -> None:
        patches = im2col(source, window, parts[i])  # (pixels, KH·KW·C)
        out = pixels(y[parts[i][0], :, parts[i][1]])  # (pixels, O)
        (product if len(parts) > 1 else product_by_columns)(patches, filters, out)
        if bias_row is not None:
            wide, b = widen(out, bias_row)
            wide += b
        if finish is not None:
            finish(i, out)

    bias_row = None if bias is None else repeated(bias)
    each(block, range(len(parts)))
    return y


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    """dx alone"""
    return input_gradient(partial(rows, dy), len(dy), dy.dtype, weight, window)


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dw alone, with db if asked"""
    return filter_gradient(partial(rows, dy), dy.shape[1], x, window, with_bias)


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """The way that the sizes favour"""
    return gradients(partial(rows, dy), x, weight, window, needs_dx, needs_dw, with_bias)


def gradients(
    upstream: Source, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """dx, dw, db, by the way that the sizes favour."""
    small_padding = 2 * max(window.padding) < min(window.kernel)  # dy is no larger than x
    if needs_dx and needs_dw and small_padding and winograd.pays(x.shape, len(weight), window):
        return winograd.conv2d_backward(upstream, x, weight, window, with_bias)
    return both_gradients(upstream, x, weight, window, needs_dx, needs_dw, with_bias)


def input_gradient(upstream: Source, n: int, dtype: np.dtype, weight: Array, window: Window) -> Array:
    """dx: at stride 1 a correlation of dy, else col2im(dy · filters)"""
    (kh, kw), (ph, pw) = window.kernel, window.padding
    if window.stride == (1, 1) and ph < kh and pw < kw:
        # Each pixel gathers: the correlation of dy with the filters turned by 180°, inputs and outputs exchanged.
        mirror = Window.of(window.output, window.kernel, 1, (kh - 1 - ph, kw - 1 - pw))
        return correlate(upstream, n, dtype, turned_columns(weight), None, mirror)
    filters = filter_matrix(weight)  # (O, KH·KW·C)
    dx = empty_images(np, (n, weight.shape[1], *window.input), dtype)

    def block(parts: list[Block]) -> None:
        dx[parts[0][0]].transpose(0, 2, 3, 1)[...] = 0
        for part in parts:
            dy = matrix(upstream(part))  # (pixels, O)
            patches = scratch("patches", (len(dy), filters.shape[1]), dtype)  # (pixels, KH·KW·C)
            product(dy, filters, patches)
            add_inside(dx, col2im(patches, window, part), window, part)

    each(block, by_image(cut(n, window.output, filters.itemsize * filters.shape[1], PATCH_BYTES)))
    return dx


def filter_gradient(upstream: Source, o: int, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dw = (patches of x)ᵀ · dy, and db = column sums of dy"""
    (kh, kw), c = window.kernel, x.shape[1]
    parts = cut(len(x), window.output, x.itemsize * kh * kw * c, PATCH_BYTES, multiply_adds=kh * kw * c * o)
    lanes = min(LANES, len(parts))
    dw = np.empty((lanes, kh * kw * c, o), x.dtype)
    db = np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        for part in parts[i::lanes]:
            patches = im2col(partial(rows, x), window, part)  # (pixels, KH·KW·C)
            dy = matrix(upstream(part))  # (pixels, O)
            product_of_transposed(patches, dy, dw[i], add=part is not parts[i])
            if with_bias:
                db[i] += column_sums(dy)

    each(lane, range(lanes))
    total = np.ascontiguousarray(sum_of_lanes(dw).T)  # (O, KH·KW·C)
    return total.reshape(o, kh, kw, c).transpose(0, 3, 1, 2), db.sum(0) if with_bias else None


def both_gradients(
    upstream: Source, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """dx, dw, db from patches of dy where the stride is 1: the same sums as by the book, in another order.

    dy meets x[h] through the cell u of the filter where it meets x[h + 1] through u + 1. So the pixels of dy that x[h]
    had a part in are again a window, around h, and the cell of the filter runs backwards in it.
    """
    (kh, kw), (ph, pw), o, c = window.kernel, window.padding, len(weight), x.shape[1]
    if window.stride != (1, 1) or 2 * ph >= kh or 2 * pw >= kw or not (needs_dx and needs_dw):
        dx = input_gradient(upstream, len(x), x.dtype, weight, window) if needs_dx else None
        needs_dw |= with_bias
        return dx, *(filter_gradient(upstream, o, x, window, with_bias) if needs_dw else (None, None))
    # One patch matrix gives both gradients: dx = dy_patches · filters turned by 180°, and the turned filters' gradient
    # = dy_patchesᵀ · x.
    mirror = Window.of(window.output, window.kernel, 1, (kh - 1 - ph, kw - 1 - pw))
    turned = turned_columns(weight)  # (KH·KW·O, C)
    itself = slice((ph * kw + pw) * o, (ph * kw + pw + 1) * o)  # the cell of a patch that runs over dy once
    dx = empty_images(np, x.shape, x.dtype)
    parts = cut(len(x), window.input, x.itemsize * len(turned), PATCH_BYTES, multiply_adds=2 * turned.size)
    lanes = min(LANES, len(parts))
    dw, db = np.empty((lanes, *turned.shape), x.dtype), np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        for part in parts[i::lanes]:
            dy_patches = im2col(upstream, mirror, part)  # (pixels of x, KH·KW·O)
            product(dy_patches, turned, pixels(dx[part[0], :, part[1]]))
            product_of_transposed(dy_patches, pixels(x[part[0], :, part[1]]), dw[i], add=part is not parts[i])
            if with_bias:
                db[i] += column_sums(dy_patches[:, itself])

    each(lane, range(lanes))
    total = sum_of_lanes(dw).reshape(kh, kw, o, c)[::-1, ::-1].transpose(2, 0, 1, 3)  # (O, KH, KW, C)
    total = np.ascontiguousarray(total)
    return dx, total.transpose(0, 3, 1, 2), db.sum(0) if with_bias else None


def filter_columns(weight: Array) -> Array:
    """One filter a column: (KH·KW·C, O). Copied into that order where BLAS takes it as it lies: see UNPACKED."""
    columns = filter_matrix(weight).T
    return np.ascontiguousarray(columns) if columns.size * PIECES[-1] <= UNPACKED else columns


def turned_columns(weight: Array) -> Array:
    """The filters turned by 180°, inputs and outputs exchanged: (KH·KW·O, C)."""
    return weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1).reshape(-1, weight.shape[1])


# --- products


# OpenBLAS multiplies up to 10⁶ multiply-adds without first packing the operands. For a filter bank of few channels a
# stack of such products is up to twice as fast as one tall product.
UNPACKED = 1_000_000
PIECES = 512, 256, 128, 64, 32  # rows of one of them
COLUMNS = 96  # at least, of a product that is cut by columns


def piece_length(rows: int, cells: int) -> int:
    """How many rows at a time to multiply with a (K, O) matrix of so many cells: all, or an unpacked product's."""
    count = UNPACKED // cells
    for piece in PIECES:
        if piece <= count and rows % piece == 0:
            return piece
    return rows


def product(a: Array, b: Array, out: Array) -> None:
    """out = a · b, for a tall a (rows, K) and a small b (K, O)."""
    piece = piece_length(len(a), b.size)
    np.matmul(stack(a, piece), b, out=stack(out, piece))


def product_by_columns(a: Array, b: Array, out: Array) -> None:
    """The same, a part of the columns after the other: several threads have work where there is but one block of rows.
    Each part packs a again, so that none shall be narrow."""
    parts = min(2 * len(a) * b.size // ENOUGH, b.shape[1] // COLUMNS)
    if parts < 2:
        product(a, b, out)
    else:
        each(lambda own: np.matmul(a, b[:, own], out=out[:, own]), even(b.shape[1], -(-b.shape[1] // parts)))


def product_of_transposed(a: Array, b: Array, total: Array, *, add: bool = False) -> None:
    """total = aᵀ · b, for tall a (rows, K) and b (rows, O); += if `add`."""
    piece = piece_length(len(a), a.shape[1] * b.shape[1])
    if piece == len(a):
        multiply(a.T, b, total, add=add)
        return
    products = np.matmul(stack(a, piece).transpose(0, 2, 1), stack(b, piece))
    if add:
        total += products.sum(0)
    else:
        products.sum(0, out=total)


def stack(matrix: Array, piece: int) -> Array:
    """The rows, `piece` at a time: (rows / piece, piece, columns), a view."""
    return matrix.reshape(-1, piece, matrix.shape[1], copy=False)


# --- convolution, batch norm and ReLU in one


def conv_bn_relu(
    x: Array, weight: Array, window: Window, mean: Array, var: Array, gamma: Array, beta: Array, eps: float
) -> Array:
    """Batch norm as filters·scale and a bias, or where filters are longer than there are pixels, as pixels·scale;
    max(0, ·) of each block while it is in the cache"""
    scale, shift = scale_and_shift(mean, var, gamma, beta, eps)
    folded = len(x) * math.prod(window.output) >= weight[0].size

    def finish(_: int, out: Array) -> None:
        if not folded:
            out *= scale
            out += shift
        np.maximum(out, 0, out=out)

    filters, bias = (weight * scale[:, None, None, None], shift) if folded else (weight, None)
    return convolved(x, filters, bias, window, finish)


def conv2d_statistics(x: Array, weight: Array, window: Window) -> tuple[Array, Array, Array]:
    """The moments of each block while it is in the cache"""
    found: dict[int, Moments] = {}

    def finish(i: int, out: Array) -> None:
        found[i] = moments(out)

    y = convolved(x, weight, None, window, finish)
    return y, *merged(found)


def conv_bn_relu_backward(
    dzs: list[Array], x: Array, weight: Array, window: Window, y: Array, mean: Array, var: Array, gamma: Array,
    beta: Array, eps: float, needs_dx: bool,
) -> tuple[Array | None, Array | None, Array, Array]:  # fmt: skip
    """One pass over dz and y for the sums; a second where the convolution's backward reads its gradient from them"""
    source, scale, dgamma, dbeta = through_batch_norm(dzs, y, mean, var, gamma, beta, eps, True, True)
    of_filters = scale[:, None, None, None]
    dx, dw, _ = gradients(source, x, weight * of_filters, window, needs_dx, True, False)
    dw *= of_filters
    return dx, dw, dgamma, dbeta
