"""The kernels on NumPy: the textbook, applied to a block of images.

A convolution is im2col and a matrix product. For a whole batch the patches would be far larger than the cache, so
each kernel cuts the batch into blocks (a few images, or a band of rows of one), runs the textbook on a block while
everything it touches stays in the cache, and lets `threads.each` spread the blocks over the cores. Read `block`
first in each function. The blocks follow from the shapes alone, and sums over blocks are added in a fixed order:
the results are the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from minigrad.kernels import winograd
from minigrad.kernels.blocks import (
    BLOCK_BYTES,
    LANES,
    PATCH_BYTES,
    Block,
    blocks,
    by_image,
    column_sums,
    each,
    repeated,
    row_blocks,
    scratch,
    widen,
)
from minigrad.layout import Array, Window, empty_images, filter_matrix, pixels

BYTE = np.dtype(np.int8)
Index = tuple[slice, ...]
Source = Callable[[Block], Array]  # a block of images to read, (images, rows, columns, C): stored, or computed then


# --- convolution


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    if winograd.pays(x.shape, len(weight), window):
        return winograd.conv2d(x, weight, bias, window)
    return correlate(partial(rows, x), len(x), x.dtype, filter_columns(weight), bias, window)


def correlate(
    source: Source, n: int, dtype: np.dtype, filters: Array, bias: Array | None, window: Window,
    finish: Callable[[int, Array], None] | None = None,
) -> Array:  # fmt: skip
    """The images (N, O, OH, OW) of the patches of `source` times filters (KH·KW·C, O).

    finish   called with each block's number and pixels (rows, O), while they are in the cache
    """
    y = empty_images(np, (n, filters.shape[1], *window.output), dtype)
    parts = blocks(n, window.output, filters.itemsize * len(filters), PATCH_BYTES)

    def block(i: int) -> None:
        patches = im2col(source, window, parts[i])  # (pixels, KH·KW·C)
        out = pixels(y[parts[i][0], :, parts[i][1]])  # (pixels, O)
        product(patches, filters, out)
        if bias_row is not None:
            wide, b = widen(out, bias_row)
            wide += b
        if finish is not None:
            finish(i, out)

    bias_row = None if bias is None else repeated(bias)
    each(block, range(len(parts)))
    return y


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    return input_gradient(partial(rows, dy), len(dy), dy.dtype, weight, window)


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    return filter_gradient(partial(rows, dy), dy.shape[1], x, window, with_bias)


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    if needs_dx and needs_dw and max(window.padding) <= 1 and winograd.pays(x.shape, len(weight), window):
        return winograd.conv2d_backward(dy, x, weight, window, with_bias)
    return both_gradients(partial(rows, dy), x, weight, window, needs_dx, needs_dw, with_bias)


def input_gradient(upstream: Source, n: int, dtype: np.dtype, weight: Array, window: Window) -> Array:
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

    each(block, by_image(blocks(n, window.output, filters.itemsize * filters.shape[1], PATCH_BYTES)))
    return dx


def filter_gradient(upstream: Source, o: int, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    (kh, kw), c = window.kernel, x.shape[1]
    parts = blocks(len(x), window.output, x.itemsize * kh * kw * c, PATCH_BYTES)
    lanes = min(LANES, len(parts))
    dw = np.zeros((lanes, kh * kw * c, o), x.dtype)
    db = np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        for part in parts[i::lanes]:
            patches = im2col(partial(rows, x), window, part)  # (pixels, KH·KW·C)
            dy = matrix(upstream(part))  # (pixels, O)
            dw[i] += product_of_transposed(patches, dy)
            if with_bias:
                db[i] += column_sums(dy)

    each(lane, range(lanes))
    total = np.ascontiguousarray(dw.sum(0).T)  # (O, KH·KW·C)
    return total.reshape(o, kh, kw, c).transpose(0, 3, 1, 2), db.sum(0) if with_bias else None


def both_gradients(
    upstream: Source, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    (kh, kw), (ph, pw), o, c = window.kernel, window.padding, len(weight), x.shape[1]
    if window.stride != (1, 1) or 2 * ph >= kh or 2 * pw >= kw or not (needs_dx and needs_dw):
        dx = input_gradient(upstream, len(x), x.dtype, weight, window) if needs_dx else None
        needs_dw |= with_bias
        return dx, *(filter_gradient(upstream, o, x, window, with_bias) if needs_dw else (None, None))
    # Each pixel of x gathers the patch of dy that it had a part in. One patch matrix gives both gradients:
    # dx = patches · filters turned by 180°, and the turned filters' gradient = patchesᵀ · x.
    mirror = Window.of(window.output, window.kernel, 1, (kh - 1 - ph, kw - 1 - pw))
    turned = turned_columns(weight)  # (KH·KW·O, C)
    itself = slice((ph * kw + pw) * o, (ph * kw + pw + 1) * o)  # the cell of a patch that runs over dy once
    dx = empty_images(np, x.shape, x.dtype)
    parts = blocks(len(x), window.input, x.itemsize * len(turned), PATCH_BYTES)
    lanes = min(LANES, len(parts))
    dw, db = np.zeros((lanes, *turned.shape), x.dtype), np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        for part in parts[i::lanes]:
            patches = im2col(upstream, mirror, part)  # (pixels of x, KH·KW·O)
            product(patches, turned, pixels(dx[part[0], :, part[1]]))
            dw[i] += product_of_transposed(patches, pixels(x[part[0], :, part[1]]))
            if with_bias:
                db[i] += column_sums(patches[:, itself])

    each(lane, range(lanes))
    total = dw.sum(0).reshape(kh, kw, o, c)[::-1, ::-1].transpose(2, 0, 1, 3).copy()  # (O, KH, KW, C)
    return dx, total.transpose(0, 3, 1, 2), db.sum(0) if with_bias else None


def filter_columns(weight: Array) -> Array:
    """One filter a column: (KH·KW·C, O)."""
    return np.ascontiguousarray(filter_matrix(weight).T)


def turned_columns(weight: Array) -> Array:
    """The filters turned by 180°, inputs and outputs exchanged: (KH·KW·O, C)."""
    return weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1).reshape(-1, weight.shape[1])


# --- convolution, batch norm and ReLU in one


def conv2d_relu(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    def finish(_: int, out: Array) -> None:
        np.maximum(out, 0, out=out)

    if winograd.pays(x.shape, len(weight), window):
        y = winograd.conv2d(x, weight, bias, window)
        return np.maximum(y, 0, out=y)
    return correlate(partial(rows, x), len(x), x.dtype, filter_columns(weight), bias, window, finish)


def conv2d_statistics(x: Array, weight: Array, bias: Array | None, window: Window) -> tuple[Array, Array, Array]:
    found: dict[int, Moments] = {}  # taken from each block while it is in the cache

    def finish(i: int, out: Array) -> None:
        found[i] = moments(out)

    if winograd.pays(x.shape, len(weight), window):
        y = winograd.conv2d(x, weight, bias, window)
        return y, *statistics(y)
    y = correlate(partial(rows, x), len(x), x.dtype, filter_columns(weight), bias, window, finish)
    return y, *merged(found)


def conv_bn_relu_backward(
    dzs: list[Array], x: Array, weight: Array, window: Window, y: Array, mean: Array, var: Array, gamma: Array,
    beta: Array, eps: float, needs_dx: bool, with_bias: bool,
) -> tuple[Array | None, Array | None, Array | None, Array, Array]:  # fmt: skip
    upstream, dgamma, dbeta = through_batch_norm(dzs, y, mean, var, gamma, beta, eps, True, True)
    if winograd.pays(x.shape, len(weight), window):  # whose tiles overlap: it reads dy more than once
        dy = stored(upstream, y)
        return *conv2d_backward(dy, x, weight, window, needs_dx, True, with_bias), dgamma, dbeta
    return *both_gradients(upstream, x, weight, window, needs_dx, True, with_bias), dgamma, dbeta


# OpenBLAS multiplies up to 10⁶ multiply-adds without first packing the operands. For a filter bank of few channels a
# stack of such products is up to twice as fast as one tall product.
UNPACKED = 1_000_000


def pieces(rows: int, cells: int) -> int:
    """How many rows at a time to multiply with a (K, O) matrix of so many cells: all, or an unpacked product's."""
    count = UNPACKED // cells
    for piece in (512, 256, 128, 64, 32):
        if piece <= count and rows % piece == 0:
            return piece
    return rows


def product(a: Array, b: Array, out: Array) -> None:
    """out = a · b, for a tall a (rows, K) and a small b (K, O)."""
    piece = pieces(len(a), b.size)
    np.matmul(stack(a, piece), b, out=stack(out, piece))


def product_of_transposed(a: Array, b: Array) -> Array:
    """aᵀ · b, for tall a (rows, K) and b (rows, O)."""
    piece = pieces(len(a), a.shape[1] * b.shape[1])
    if piece == len(a):
        return a.T @ b
    return np.matmul(stack(a, piece).transpose(0, 2, 1), stack(b, piece)).sum(0)


def stack(matrix: Array, piece: int) -> Array:
    """The rows, `piece` at a time: (rows / piece, piece, columns), a view."""
    return matrix.reshape(-1, piece, matrix.shape[1], copy=False)


def rows(x: Array, part: Block) -> Array:
    """Some rows of some images: (images, rows, columns, C), a view."""
    return x[part[0], :, part[1]].transpose(0, 2, 3, 1)


def matrix(grid: Array) -> Array:
    """(images, rows, columns, C) as (pixels, C)."""
    return grid.reshape(-1, grid.shape[3])


def im2col(source: Source, window: Window, part: Block) -> Array:
    """The patches that a block's output pixels see: (pixels, KH·KW·C). The pixel matrix itself for 1×1."""
    if window.is_pointwise:
        return matrix(source(part))
    (kh, kw), (sh, sw) = window.kernel, window.stride
    band = padded(source, window, part)  # (images, rows, columns, C)
    n, _, _, c = band.shape
    count, ow = part[1].stop - part[1].start, window.output[1]
    image, row, column, channel = band.strides
    # Output pixel (i, j) of image n is the window of the band at n, i·sh, j·sw.
    shape, strides = (n, count, ow, kh, kw, c), (image, row * sh, column * sw, row, column, channel)
    windows: Array = np.ndarray(shape, band.dtype, band, 0, strides)  # as_strided, without its overhead
    patches = scratch("patches", shape, band.dtype)
    np.copyto(patches, windows)
    return patches.reshape(n * count * ow, kh * kw * c)


def col2im(patches: Array, window: Window, part: Block) -> Array:
    """Patches added up where they overlap: the band (images, rows, columns, C). The transpose of im2col."""
    (kh, kw), ow = window.kernel, window.output[1]
    (sh, sw), count = window.stride, part[1].stop - part[1].start
    cells = patches.reshape(-1, count, ow, kh, kw, patches.shape[1] // (kh * kw))
    band = np.zeros((len(cells), *padded_size(window, part), cells.shape[5]), patches.dtype)
    for u in range(kh):
        for v in range(kw):
            band[:, u : u + (count - 1) * sh + 1 : sh, v : v + (ow - 1) * sw + 1 : sw] += cells[:, :, :, u, v]
    return band


def padded(source: Source, window: Window, part: Block) -> Array:
    """The input rows that a block's windows see, zeros around them: (images, rows, columns, C), C contiguous."""
    height, width = padded_size(window, part)
    seen, there = inside(window, part)
    values = source((part[0], seen[0]))[:, :, seen[1]]
    if there == (slice(0, height), slice(0, width)) and values.flags.c_contiguous:
        return values
    band = scratch("band", (len(values), height, width, values.shape[3]), values.dtype)
    (top, bottom), (left, right) = ((part.start, part.stop) for part in there)
    band[:, :top], band[:, bottom:], band[:, :, :left], band[:, :, right:] = 0, 0, 0, 0
    band[:, *there] = values
    return band


def add_inside(dx: Array, band: Array, window: Window, part: Block) -> None:
    """Add a band's part inside the image to dx. The transpose of `padded`."""
    seen, there = inside(window, part)
    target = dx[part[0]].transpose(0, 2, 3, 1)[:, *seen]
    target += band[:, *there]


def padded_size(window: Window, part: Block) -> tuple[int, int]:
    """Rows and columns of the band that a block's windows cover."""
    (kh, kw), (sh, sw) = window.kernel, window.stride
    return (part[1].stop - part[1].start - 1) * sh + kh, (window.output[1] - 1) * sw + kw


def inside(window: Window, part: Block) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a band lies in the image, and the image in the band: (rows, columns) of each."""
    (h, w), (ph, pw) = window.input, window.padding
    height, width = padded_size(window, part)
    top = part[1].start * window.stride[0] - ph
    rows = slice(max(top, 0), min(top + height, h))
    columns = slice(0, min(width - pw, w))
    return (rows, columns), (slice(rows.start - top, rows.stop - top), slice(pw, pw + columns.stop))


# --- pooling


def max_pool(x: Array, window: Window) -> Array:
    return maximum_of_windows(x, window, None)


def max_pool_winners(x: Array, window: Window) -> tuple[Array, list[Array]]:
    n, c, h, _ = x.shape
    oh, ow = window.output
    winners = [empty_images(np, (n, c, *size), BYTE) for size in ((h, ow), (oh, ow))]
    return maximum_of_windows(x, window, winners), winners


def maximum_of_windows(x: Array, window: Window, winners: list[Array] | None) -> Array:
    y = empty_images(np, (*x.shape[:2], *window.output), x.dtype)

    def block(part: Block) -> None:
        # The maximum across the columns, then down the rows.
        seen = seen_rows(window, part)
        source, out = rows(x, (part[0], seen)), rows(y, part)
        across = scratch("across", (*source.shape[:2], *out.shape[2:]), x.dtype)
        won = (rows(winners[0], (part[0], seen)), rows(winners[1], part)) if winners else (None, None)
        maximum_of(source, taps(window, 1), across, won[0])
        maximum_of(across, taps(window, 0, part[1], seen), out, won[1])

    each(block, blocks(len(x), window.output, x.itemsize * x.shape[1], BLOCK_BYTES))
    return y


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    dx = empty_images(np, (*dy.shape[:2], *window.input), dy.dtype)

    def block(parts: list[Block]) -> None:
        alone = len(parts) == 1  # else they are bands of one image, and where their windows overlap gradients add up
        if not alone:
            rows(dx, (parts[0][0], slice(None)))[...] = 0
        for part in parts:
            # dy goes back the way the maximum came: down the rows, then across the columns.
            seen = slice(0, window.input[0]) if alone else seen_rows(window, part)
            upstream, target = rows(dy, part), rows(dx, (part[0], seen))
            d_across = scratch("across", (*target.shape[:2], *upstream.shape[2:]), dy.dtype)
            hand_to(rows(winners[1], part), upstream, taps(window, 0, part[1], seen), d_across)
            hand_to(rows(winners[0], (part[0], seen)), d_across, taps(window, 1), target, add=not alone)

    each(block, by_image(blocks(len(dy), window.output, dy.itemsize * dy.shape[1], BLOCK_BYTES)))
    return dx


def taps(window: Window, axis: int, out: slice | None = None, seen: slice | None = None) -> list[Tap]:
    """For each cell of the kernel along an axis (0: rows, 1: columns): the output cells for which it falls inside the
    image, and the input cells it falls on.

    out, seen   a band: which output cells, and which input cells, both then counted from their start
    """
    size, k, s, p, count = (pair[axis] for pair in window)
    first, last = (out.start, out.stop) if out else (0, count)
    start = seen.start if seen else 0
    found = []
    for v in range(k):
        low, high = max(first, -((v - p) // s)), min(last, (size - 1 + p - v) // s + 1)  # 0 ≤ i·s − p + v < size
        if low < high:
            found.append(Tap(axis, v, slice(low - first, high - first), low * s - p + v - start, s))
    return found


class Tap(NamedTuple):
    """One cell of the kernel along an axis of (images, rows, columns, C)."""

    axis: int  # 0: rows, 1: columns
    number: int
    out: slice  # the output cells for which it falls inside the image
    first: int  # the input cell it falls on for the first of them
    stride: int

    def cells(self, start: int = 0, stop: int | None = None) -> tuple[Index, Index]:
        """Where in the output and where in the input, for output cells from `start` to before `stop`."""
        start, stop = max(start, self.out.start), self.out.stop if stop is None else min(stop, self.out.stop)
        first = self.first + (start - self.out.start) * self.stride
        before = (slice(None),) * (self.axis + 1)
        return (*before, slice(start, stop)), (
            *before,
            slice(first, first + (stop - start - 1) * self.stride + 1, self.stride),
        )


def seen_rows(window: Window, part: Block) -> slice:
    """The input rows that the windows of a band see."""
    top = part[1].start * window.stride[0] - window.padding[0]
    bottom = (part[1].stop - 1) * window.stride[0] - window.padding[0] + window.kernel[0]
    return slice(max(top, 0), min(bottom, window.input[0]))


def maximum_of(source: Array, cells: list[Tap], best: Array, winner: Array | None = None) -> None:
    """best = the maximum over the cells of the kernel; winner = the number of the first cell that has it."""
    reached = best.shape[cells[0].axis + 1]  # from here on, output cells have met a cell of the kernel already
    for tap in cells:
        if tap.out.start < reached:
            o, i = tap.cells(stop=reached)
            best[o] = source[i]
            if winner is not None:
                winner[o] = tap.number
        if reached < tap.out.stop:
            o, i = tap.cells(start=reached)
            if winner is not None:
                larger = scratch("mask", best[o].shape, BYTE)
                np.greater(source[i], best[o], out=larger.view(bool))
                larger *= BYTE.type(tap.number)
                np.maximum(winner[o], larger, out=winner[o])
            np.maximum(best[o], source[i], out=best[o])
        reached = min(reached, tap.out.start)


def hand_to(winner: Array, upstream: Array, cells: list[Tap], target: Array, *, add: bool = False) -> None:
    """target = for each cell the sum of `upstream` over the windows that it won; += if `add`."""
    # A cell that meets all of both, as the middle one does at stride 1, comes first: it leaves nothing to fill.
    size = upstream.shape[cells[0].axis + 1], target.shape[cells[0].axis + 1]
    complete = [tap for tap in cells if tap.stride == 1 and size == (tap.out.stop - tap.out.start,) * 2 and not add]
    if not (add or complete):
        target.fill(0)
    for tap in complete[:1] + [tap for tap in cells if tap not in complete[:1]]:
        o, i = tap.cells()
        won = scratch("mask", upstream[o].shape, BYTE).view(bool)
        np.equal(winner[o], BYTE.type(tap.number), out=won)
        if tap in complete[:1]:
            keep_where(won, upstream[o], out=target[i])
        else:
            taken = scratch("taken", won.shape, upstream.dtype)
            keep_where(won, upstream[o], out=taken)
            np.add(target[i], taken, out=target[i])


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


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    y = empty_images(np, (*x.shape[:2], *window.output), x.dtype)
    share = reciprocal_counts(window, count_padding, x.dtype)

    def block(part: Block) -> None:
        seen = seen_rows(window, part)
        source, out = rows(x, (part[0], seen)), rows(y, part)
        across = np.zeros((*source.shape[:2], window.output[1], source.shape[3]), x.dtype)
        for o, i in (tap.cells() for tap in taps(window, 1)):
            across[o] += source[i]
        out.fill(0)
        for o, i in (tap.cells() for tap in taps(window, 0, part[1], seen)):
            out[o] += across[i]
        out *= share[part[1]]

    each(block, blocks(len(x), window.output, x.itemsize * x.shape[1], BLOCK_BYTES))
    return y


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    n, c = dy.shape[:2]
    dx = empty_images(np, (n, c, *window.input), dy.dtype)
    share = reciprocal_counts(window, count_padding, dy.dtype)

    def block(parts: list[Block]) -> None:
        rows(dx, (parts[0][0], slice(None)))[...] = 0
        for part in parts:
            seen = seen_rows(window, part)
            spread = rows(dy, part) * share[part[1]]
            d_across = np.zeros((len(spread), seen.stop - seen.start, window.output[1], c), dy.dtype)
            for o, i in (tap.cells() for tap in taps(window, 0, part[1], seen)):
                d_across[i] += spread[o]
            target = rows(dx, (part[0], seen))
            for o, i in (tap.cells() for tap in taps(window, 1)):
                target[i] += d_across[o]

    each(block, by_image(blocks(n, window.output, dy.itemsize * c, BLOCK_BYTES)))
    return dx


def reciprocal_counts(window: Window, count_padding: bool, dtype: np.dtype) -> Array:
    """1 / the number of cells each output pixel averages over: (OH, OW, 1)."""
    counts = []
    for size, k, s, p, out in zip(*window, strict=True):
        first, last = (-p, size + p) if count_padding else (0, size)
        starts = np.arange(out) * s - p
        counts.append(np.minimum(starts + k, last) - np.maximum(starts, first))
    return (1.0 / np.outer(*counts)).astype(dtype)[:, :, None]


# --- normalisation


def statistics(x: Array) -> tuple[Array, Array]:
    m = pixels(x)
    parts = row_blocks(m)
    found: dict[int, Moments] = {}
    each(lambda i: found.update({i: moments(m[parts[i]])}), range(len(parts)))
    return merged(found)


class Moments(NamedTuple):
    """Of the rows of a matrix: how many, their mean, and the sum of squares around it, float64 (C,)."""

    n: int
    mean: Array
    squares: Array


def moments(values: Array) -> Moments:
    # Sums of x − shift, not of x: Σx² − (Σx)²/n would lose the variance of a channel far from zero.
    n, c = values.shape
    shift = column_sums(values) / n
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
    source, dgamma, dbeta = through_batch_norm([dy], x, mean, var, gamma, beta, eps, relu, through_statistics)
    return stored(source, x), dgamma, dbeta


def stored(source: Source, like: Array) -> Array:
    """What a source computes, as images of the shape of `like`."""
    whole = empty_images(np, like.shape, like.dtype)

    def block(part: Block) -> None:
        rows(whole, part)[...] = source(part)

    each(block, blocks(len(like), like.shape[2:], like.itemsize * like.shape[1], BLOCK_BYTES))
    return whole


def through_batch_norm(
    dys: list[Array], x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Source, Array, Array]:  # fmt: skip
    """The gradient of x, to be computed block by block where it is read; dgamma and dbeta.

    dys   the upstream gradient, cut along the channels
    """
    scale, shift = (repeated(v) for v in scale_and_shift(mean, var, gamma, beta, eps))
    threshold = -shift  # x·scale + shift > 0 where x·scale > threshold, exactly
    centre = repeated(mean.astype(x.dtype))
    c = x.shape[1]
    dz = dys[0] if len(dys) == 1 and not relu else empty_images(np, x.shape, x.dtype)  # the gradient before the ReLU
    parts = blocks(len(x), x.shape[2:], x.itemsize * c, BLOCK_BYTES)
    sums = np.empty((2, len(parts), c))

    def reduce(i: int) -> None:
        """dz; Σ dz and Σ dz·(x − mean)."""
        values, s, edge, m = widen(matrix(rows(x, parts[i])), scale, threshold, centre)
        before, product = joined(dys, parts[i]).reshape(values.shape), scratch("product", values.shape, x.dtype)
        if dz is not dys[0]:
            after, before = before, matrix(rows(dz, parts[i])).reshape(values.shape)
            if relu:
                passed = scratch("mask", values.shape, BYTE).view(bool)
                np.greater(np.multiply(values, s, out=product), edge, out=passed)
                keep_where(passed, after, out=before)
            else:
                before[...] = after
        np.subtract(values, m, out=product)
        product *= before
        for total, summands in zip(sums[:, i], (before, product), strict=True):
            total[...] = column_sums(summands, c)

    each(reduce, range(len(parts)))
    dbeta, dot = sums.sum(1)
    dot += (mean.astype(x.dtype) - mean) * dbeta  # Σ dz·(x − mean) with the mean before it was rounded
    dgamma = dot / np.sqrt(var + eps)
    # dx = scale · (dz − mean(dz) − (x − mean) · mean(dz·(x − mean)) / (var + eps)), as dz·scale + x·slope + offset
    n = x.size // c if through_statistics else np.inf
    full = gamma / np.sqrt(var + eps)  # float64
    by_x = -full * dot / (n * (var + eps))
    slope, offset = (repeated(v.astype(x.dtype)) for v in (by_x, -full * dbeta / n - by_x * mean))

    def source(part: Block) -> Array:
        values, s, a, b = widen(matrix(rows(x, part)), scale, slope, offset)
        dx = scratch("dx", values.shape, x.dtype)
        np.multiply(matrix(rows(dz, part)).reshape(values.shape), s, out=dx)
        if through_statistics:
            linear = np.multiply(values, a, out=scratch("product", values.shape, x.dtype))
            linear += b
            dx += linear
        return dx.reshape(rows(x, part).shape)

    return source, dgamma.astype(gamma.dtype), dbeta.astype(beta.dtype)


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
    scale = gamma / np.sqrt(var + eps)  # float64
    return scale.astype(gamma.dtype), (beta - mean * scale).astype(gamma.dtype)


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


# --- loss, joins


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    n, k = logits.shape
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    target = np.full((n, k), smoothing / k, logits.dtype)
    target[np.arange(n), labels] += 1 - smoothing
    return -(target * log_p).sum(axis=1), np.exp(log_p) - target


def concat(xs: list[Array]) -> Array:
    n, _, h, w = xs[0].shape
    y = empty_images(np, (n, sum(x.shape[1] for x in xs), h, w), xs[0].dtype)

    def block(part: Block) -> None:
        end = 0
        for x in xs:
            start, end = end, end + x.shape[1]
            y[part[0], start:end, part[1]] = x[part[0], :, part[1]]

    each(block, blocks(n, (h, w), y.itemsize * y.shape[1], BLOCK_BYTES))
    return y


def add(a: Array, b: Array, out: Array | None) -> Array:
    if a.ndim != 4:
        return np.add(a, b, out=out)
    total = empty_images(np, a.shape, a.dtype) if out is None else out

    def block(part: Block) -> None:
        x, y, z = (m[part[0], :, part[1]].transpose(0, 2, 3, 1) for m in (a, b, total))
        np.add(x, y, out=z)

    each(block, blocks(len(a), a.shape[2:], a.itemsize * a.shape[1], BLOCK_BYTES))
    return total
