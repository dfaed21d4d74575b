"""3×3 and 5×5 convolutions with fewer multiplications: Winograd's F(4×4, 3×3) and F(2×2, 5×5).

Lavin, Gray: Fast algorithms for convolutional neural networks, arXiv:1509.09308, section 4.

In one dimension. The product of two polynomials, y0 + y1·t + y2·t² + y3·t³ and g0 + g1·t + g2·t², has six coefficients
s_j = Σ_{i+k=j} y_i·g_k, made by twelve multiplications. Six do: evaluate both polynomials at six points, multiply the
values, and interpolate. Each of these is a linear map, a matrix:

    s = B[(Ay) ⊙ (Gg)]              A, G: coefficients to values      B: values to coefficients

(One of the points is ∞, where a polynomial's value is its highest coefficient. G also divides by the denominators of
Lagrange's interpolation, which B leaves out.) With g given, this is a linear map from four numbers y to six numbers s.
Its transpose takes six numbers d to four sums Σ_k d_{i+k}·g_k: a convolution of d with the filter g, four neighbouring
outputs from six inputs.

    y = Aᵀ[(Bᵀd) ⊙ (Gg)]

In two dimensions. Let d be six rows of an image, g the three rows of a filter, and each of the six products a
convolution along the rows, for which the same formula holds: y = Aᵀ[(BᵀdB) ⊙ (GgGᵀ)]A. A tile of 6×6 inputs gives 4×4
outputs with 36 multiplications instead of 144. Tiles overlap by two pixels. With polynomials of two and of five
coefficients, whose product has six as well, the same holds for 2×2 outputs of a 5×5 filter, by tiles that overlap by
four: 36 instead of 100.

With channels. Each of the 36 products is summed over C input channels, for all tiles and O filters: 36 matrix
products (tiles, C) · (C, O), one for each cell (i, j) of a tile. So everything lies in 36 planes of pixel matrices.
BᵀdB is a linear map of the 36 numbers of d, the same for all tiles and channels: one more matrix product.

The backward. Through the convolution of dy with the turned filters, whose outputs are dx (as in
`conv.both_gradients`), with V = BᵀdyB: dx = Aᵀ[V ⊙ U]A. The gradient of the filters is that of Σ dy·y with dy held
fixed, and Σ dy·y = Σ dx·x: so dU = V ⊙ AxAᵀ, and the gradient of the turned filters is GᵀdUG. V serves both.

Rounding in float32, the largest error against float64 as a part of the largest value, at 160 ReLU'd channels of 14×14
and 320 filters: y 2.7e-6 (im2col 4.2e-7), dx 3.5e-6 (5.2e-7), dw 1.3e-6 (2.5e-7). F(2×2, 3×3), a third slower on large
images, errs up to twice as much as im2col.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from minigrad.kernels.numpy_.blocks import (
    LANES,
    PATCH_BYTES,
    Block,
    Finish,
    Source,
    column_sums,
    cut,
    each,
    even,
    matrix,
    multiply,
    repeated,
    rows,
    scratch,
    widen,
)
from minigrad.kernels.numpy_.patches import padded
from minigrad.layout import Array, Window, empty, empty_images

SEEN = 6  # inputs of a tile on each axis; it makes 7 − k outputs for k×k filters
CELLS = SEEN * SEEN
SIZES = 3, 5  # of filters
# Where polynomials are evaluated, besides ∞: near 1, apart from each other, and binary fractions. With 0, ±1 and ±2, as
# usual, the largest error is three to five times as large. On the choice: Barabasz et al., arXiv:1803.10986.
POINTS = 0, 3 / 4, -3 / 4, 3 / 2, -3 / 2
PIECE = 512  # columns of planes transformed at once, which OpenBLAS does without packing: see conv.UNPACKED
FILTERS_AT_ONCE = 16  # are transformed by one product


def pays(x_shape: tuple[int, ...], filters: int, window: Window) -> bool:
    """Is it faster than im2col? From the shapes alone, as measured on one core and on two."""
    (k, across), (n, c, *_) = window.kernel, x_shape
    if k not in SIZES or k != across or window.stride != (1, 1):
        return False
    count = n * math.prod(tiles(window)[0].output)
    # In multiplications for each pair of channel and filter: what is saved; what it takes to transform the filter; what
    # it takes to transform a tile, of which a pair has its share. The last two were measured: they are copies, too.
    saved = k * k * n * math.prod(window.output) - CELLS * count
    return saved >= 1700 + 1200 * count * (1 / c + 1 / filters)


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window, finish: Finish | None = None) -> Array:
    """y = Aᵀ[(BᵀxB) ⊙ (GgGᵀ)]A, block by block"""
    u = filter_planes(weight.transpose(2, 3, 1, 0))  # (36, C, O)
    y = empty_images(np, (len(x), len(weight), *window.output), x.dtype)
    bias_row = None if bias is None else repeated(bias)
    seen, made = tiles(window)
    parts = tile_blocks(len(x), seen, x.itemsize * sum(u.shape[1:]))

    def block(i: int) -> None:
        v = transformed(INPUT, apart(padded(partial(rows, x), seen, parts[i]), seen), "v")  # 36 matrices (tiles, C)
        out = outputs(products(v, u), y, made, parts[i])  # (pixels, O)
        if bias_row is not None:
            wide, b = widen(out, bias_row)
            wide += b
        if finish is not None:
            finish(i, out)

    each(block, range(len(parts)))
    return y


def conv2d_backward(
    upstream: Source, x: Array, weight: Array, window: Window, with_bias: bool
) -> tuple[Array, Array, Array | None]:
    """dx, dw, db of a convolution with a padding of less than half a filter, so that dy is no larger than x."""
    (o, c, k, _), (ph, pw) = weight.shape, window.padding
    mirror = Window.of(window.output, k, 1, (k - 1 - ph, k - 1 - pw))
    u = filter_planes(weight.transpose(2, 3, 0, 1)[::-1, ::-1])  # (36, O, C), of the turned filters
    dx = empty_images(np, x.shape, x.dtype)
    seen, made = tiles(mirror)
    parts = tile_blocks(len(x), seen, x.itemsize * (o + c))
    lanes = min(LANES, len(parts))
    du, db = empty(np, (lanes, *u.shape), x.dtype), np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        for part in parts[i::lanes]:
            dy = padded(upstream, seen, part)  # (images, rows, columns, O)
            if with_bias:
                own = slice(mirror.padding[0], dy.shape[1] - ph)  # the rows of dy where x has rows in this block
                db[i] += column_sums(matrix(dy[:, own]))
            v = transformed(INPUT, apart(dy, seen), "v")  # 36 matrices (tiles, O)
            outputs(products(v, u), dx, made, part)
            xs = apart(padded(partial(rows, x), made, part), made)
            dm = transformed(OUTPUT[k].T, xs, "m")  # 36 matrices (tiles, C)
            multiply(v.matrices.transpose(0, 2, 1), dm.matrices, du[i], add=part is not parts[i])

    each(lane, range(lanes))
    return dx, filter_gradients(du, k), db.sum(0) if with_bias else None


# --- A, B and G


def at_points(degree: int) -> Array:
    """The powers 0 … degree of each point, and of ∞: with a polynomial's coefficients, its values there."""
    return np.array([*([point**i for i in range(degree + 1)] for point in POINTS), [0] * degree + [1]])


def through_points() -> Array:
    """A row for each point: the coefficients of Π (t − q) over all points q but that one; for ∞, over all. This is
    Lagrange's interpolation, but for the denominators."""
    others = [[q for q in POINTS if q != p] for p in POINTS]
    return np.array([[*np.poly(roots)[::-1], *[0] * (len(POINTS) - len(roots))] for roots in (*others, POINTS)])


def denominators() -> Array:
    """Of Lagrange's interpolation: Π (p − q) over all points q but p, for each p; for ∞ there is none."""
    return np.array([*(math.prod(p - q for q in POINTS if q != p) for p in POINTS), 1])


# For tiles as vectors: M d Mᵀ, row by row, is (M ⊗ M) · (d, row by row).
INPUT = np.kron(*2 * [through_points()])  # Bᵀ: (36, 36)
OUTPUT = {k: np.kron(*2 * [at_points(SEEN - k).T]) for k in SIZES}  # Aᵀ: (outputs, 36)
FILTER = {k: np.kron(*2 * [at_points(k - 1) / denominators()[:, None]]) for k in SIZES}  # G: (36, k·k)


# --- tiles


def tiles(window: Window) -> tuple[Window, Window]:
    """What tiles see of the input and make of the output, both as windows. The last ones may stick out."""
    size = SEEN + 1 - window.kernel[0]
    down, across = (-(-length // size) for length in window.output)
    seen = Window(window.input, (SEEN, SEEN), (size, size), window.padding, (down, across))
    return seen, Window(window.output, (size, size), (size, size), (0, 0), (down, across))


def tile_blocks(n: int, seen: Window, bytes_per_pixel: int) -> tuple[Block, ...]:
    """Some images, and some rows of tiles of them, whose 36 planes stay in the cache."""
    # For fewer tiles it takes too long to read the filters' planes. If there are less than two blocks of so many, they
    # are halved all the same, for two threads.
    least = min(64, n * math.prod(seen.output) // 2)
    return cut(n, seen.output, CELLS * bytes_per_pixel, PATCH_BYTES, least)


def cells(grid: Array, tile: Window) -> Array:
    """Cell (i, j) of each tile of a grid of pixels: (cells down, across, images, rows, columns, C), a view."""
    (down, across), (step, _) = tile.kernel, tile.stride
    n, height, width, c = grid.shape
    image, row, column, channel = grid.strides
    shape = (down, across, n, (height - down) // step + 1, (width - across) // step + 1, c)
    return np.ndarray(shape, grid.dtype, grid, 0, (row, column, image, step * row, step * column, channel))


class Planes(NamedTuple):
    """A matrix for each cell of the tiles."""

    whole: Array  # (cells, columns): with zeros behind each, up to a whole number of pieces
    matrices: Array  # (cells, tiles, C): without them, a view


def planes(purpose: str, shape: tuple[int, ...], dtype: np.dtype) -> Planes:
    """Working memory for planes of the shape (cells, tiles, C)."""
    n = math.prod(shape[1:])
    whole = scratch(purpose, (shape[0], -(-n // PIECE) * PIECE), dtype)
    whole[:, n:] = 0
    return Planes(whole, whole[:, :n].reshape(shape, copy=False))


def apart(grid: Array, tile: Window) -> Planes:
    """The cells of the tiles of a grid of pixels, copied into planes."""
    view = cells(grid, tile)
    shape = math.prod(view.shape[:2]), math.prod(view.shape[2:5]), view.shape[5]
    result = planes("tiles", shape, grid.dtype)
    np.copyto(result.matrices.reshape(view.shape, copy=False), view)
    return result


def transformed(by: Array, given: Planes, purpose: str) -> Planes:
    """A matrix (cells of the result, cells) times each column of the planes."""
    result = planes(purpose, (len(by), *given.matrices.shape[1:]), given.whole.dtype)
    before, after = (p.whole.reshape(len(p.whole), -1, PIECE).transpose(1, 0, 2) for p in (given, result))
    np.matmul(by.astype(before.dtype), before, out=after)
    return result


def products(v: Planes, u: Array) -> Planes:
    """(36, tiles, I) · (36, I, J)"""
    result = planes("m", (*v.matrices.shape[:2], u.shape[2]), u.dtype)
    np.matmul(v.matrices, u, out=result.matrices)
    return result


def outputs(m: Planes, y: Array, made: Window, part: Block) -> Array:
    """AᵀmA into a block of y, which is returned: (pixels, O)."""
    size = made.stride[0]
    block = rows(y, (part[0], slice(size * part[1].start, size * part[1].stop)))
    n, h, w, o = block.shape
    extent = size * (part[1].stop - part[1].start), size * made.output[1]
    whole = block if (h, w) == extent else scratch("band", (n, *extent, o), y.dtype)
    view = cells(whole, made)
    np.copyto(view, transformed(OUTPUT[SEEN + 1 - size], m, "tiles").matrices.reshape(view.shape, copy=False))
    if whole is not block:
        block[...] = whole[:, :h, :w]
    return matrix(block)


# --- filters


def filter_planes(taps: Array) -> Array:
    """GgGᵀ: (36, I, J) from the cells of the filters (k, k, I, J)."""
    k, _, i, j = taps.shape
    u = empty(np, (CELLS, i * j), taps.dtype)
    by = FILTER[k].astype(taps.dtype)

    def block(part: slice) -> None:
        np.matmul(by, taps[:, :, part].reshape(k * k, -1), out=u[:, part.start * j : part.stop * j])

    each(block, even(i, FILTERS_AT_ONCE))
    return u.reshape(CELLS, i, j)


def filter_gradients(du: Array, k: int) -> Array:
    """GᵀdUG of the sum over lanes, turned back: (O, C, k, k) from (lanes, 36, O, C)."""
    lanes, _, o, c = du.shape
    dw = empty(np, (o, k * k, c), du.dtype)
    by = np.tile(FILTER[k].T.astype(du.dtype), lanes)  # (k·k, lanes·36): the product sums over lanes too
    flat = du.reshape(lanes * CELLS, o * c)

    def block(part: slice) -> None:
        taps = by @ flat[:, part.start * c : part.stop * c]
        dw[part] = taps.reshape(k * k, -1, c)[::-1].transpose(1, 0, 2)

    each(block, even(o, FILTERS_AT_ONCE))
    return dw.reshape(o, k, k, c).transpose(0, 3, 1, 2)
