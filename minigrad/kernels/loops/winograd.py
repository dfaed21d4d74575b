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
products (tiles, C) · (C, O), one for each cell of a tile. So everything lies in 36 planes of pixel matrices.

The backward. Through the convolution of dy with the turned filters, whose outputs are dx (as in
`conv.both_gradients`), with V = BᵀdyB: dx = Aᵀ[V ⊙ U]A. The gradient of the filters is that of Σ dy·y with dy held
fixed, and Σ dy·y = Σ dx·x: so dU = V ⊙ AxAᵀ, and the gradient of the turned filters is GᵀdUG. V serves both.

Rounding in float32, the largest error against float64 as a part of the largest value, at 160 ReLU'd channels of 14×14
and 320 filters: y 2.7e-6 (im2col 4.2e-7), dx 3.5e-6 (5.2e-7), dw 1.3e-6 (2.5e-7). Errors are not local: the outputs of
a tile err by a part of the largest of its 36 inputs, even those that do not see it. With one pixel of 1e4 among 64
channels of usual size, neighbours that do not see it err by 4e-4 of their maximum; with 1e6 by 3e-2. An inf or NaN
spoils the whole tile, 16 outputs for 9, and inputs from 2e37 on overflow. MINIGRAD_WINOGRAD=0 in the environment, or
`use(False)`, takes im2col everywhere.
"""

from __future__ import annotations

import math
import os

import numpy as np

from minigrad.kernels.loops.blocks import LANES, flat, matrix, rounded, rows, spread
from minigrad.kernels.loops.compiled import compiled, take
from minigrad.kernels.loops.norm import add_lanes, merged, moments, room_for_moments, upstream
from minigrad.kernels.loops.product import padded, product, product_of_transposed, put_row
from minigrad.layout import Array, Window, empty, empty_images

CELLS = 36  # of a tile: six inputs on each axis; it makes 7 − k outputs for k×k filters
SIZES = 3, 5  # of filters
# Where polynomials are evaluated, besides ∞: near 1, apart from each other, and binary fractions. With 0, ±1 and ±2, as
# usual, the largest error is three to five times as large. On the choice: Barabasz et al., arXiv:1803.10986.
POINTS = 0, 3 / 4, -3 / 4, 3 / 2, -3 / 2
TILE_BYTES = 1 << 21  # of the planes of a block
TILES = 64  # of a block at least: for fewer it takes too long to read the filters' planes
V = 32  # channels that are transformed at a time
ROW = 6 * V
F = np.float32
A, B, A2, B2, S, P = F(3 / 4), F(3 / 2), F(9 / 16), F(9 / 4), F(9 / 16 + 9 / 4), F(81 / 64)

enabled = os.environ.get("MINIGRAD_WINOGRAD") != "0"


def use(on: bool) -> None:
    """Whether convolutions may take Winograd's way from now on."""
    global enabled
    enabled = on


def pays(x_shape: tuple[int, ...], filters: int, window: Window) -> bool:
    """Is it faster than im2col? From the shapes alone, as measured."""
    (k, across), (n, c, *_), (oh, ow), o = window.kernel, x_shape, window.output, filters
    if not enabled or k not in SIZES or k != across or window.stride != (1, 1):
        return False
    count = n * -(-oh // (7 - k)) * -(-ow // (7 - k))
    # In multiply-adds: what is saved; what it takes to transform the filters; what it takes to transform the tiles, V
    # channels at a time. The last two were measured.
    saved = (k * k * n * oh * ow - CELLS * count) * c * o
    return saved >= 1700 * c * o + 800 * count * V * (-(-c // V) + -(-o // V))


# --- A, B and G


def at_points(degree: int) -> Array:
    """The powers 0 … degree of each point, and of ∞: with a polynomial's coefficients, its values there."""
    return np.array([*([point**i for i in range(degree + 1)] for point in POINTS), [0] * degree + [1]])


def denominators() -> Array:
    """Of Lagrange's interpolation: Π (p − q) over all points q but p, for each p; for ∞ there is none."""
    return np.array([*(math.prod(p - q for q in POINTS if q != p) for p in POINTS), 1])


G = {(k, t): (at_points(k - 1) / denominators()[:, None]).astype(t) for k in SIZES for t in ("float32", "float64")}


def along(step):
    """Bᵀ, Aᵀ and A along one axis of a tile of 36 vectors of V values, six of which are `step` apart: a constant, so
    that LLVM sees that they are."""

    @compiled
    def seen(d, at):
        """Six vectors times Bᵀ, in their place."""
        for i in range(at, at + V):
            d0, d1, d2, d3, d4, d5 = (
                d[i],
                d[i + step],
                d[i + 2 * step],
                d[i + 3 * step],
                d[i + 4 * step],
                d[i + 5 * step],
            )
            even_a, odd_a, even_b, odd_b = d4 - B2 * d2, A * (d3 - B2 * d1), d4 - A2 * d2, B * (d3 - A2 * d1)
            d[i], d[i + step], d[i + 2 * step] = P * d0 - S * d2 + d4, even_a + odd_a, even_a - odd_a
            d[i + 3 * step], d[i + 4 * step], d[i + 5 * step] = even_b + odd_b, even_b - odd_b, P * d1 - S * d3 + d5

    @compiled
    def made_4(d, at):
        """Six vectors times Aᵀ: four in the place of the first of them."""
        for i in range(at, at + V):
            m0, m1, m2, m3, m4, m5 = (
                d[i],
                d[i + step],
                d[i + 2 * step],
                d[i + 3 * step],
                d[i + 4 * step],
                d[i + 5 * step],
            )
            s1, s2, d1, d2 = m1 + m2, m3 + m4, A * (m1 - m2), B * (m3 - m4)
            d[i], d[i + step], d[i + 2 * step] = m0 + s1 + s2, d1 + d2, A2 * s1 + B2 * s2
            d[i + 3 * step] = A2 * d1 + B2 * d2 + m5

    @compiled
    def made_2(d, at):
        """Six vectors times Aᵀ: two in the place of the first of them."""
        for i in range(at, at + V):
            m1, m2, m3, m4 = d[i + step], d[i + 2 * step], d[i + 3 * step], d[i + 4 * step]
            d[i] += m1 + m2 + m3 + m4
            d[i + step] = A * (m1 - m2) + B * (m3 - m4) + d[i + 5 * step]

    @compiled
    def evaluated_4(d, at):
        """Four vectors times A: six, in their place."""
        for i in range(at, at + V):
            x0, x1, x2, x3 = d[i], d[i + step], d[i + 2 * step], d[i + 3 * step]
            even_a, odd_a, even_b, odd_b = x0 + A2 * x2, A * (x1 + A2 * x3), x0 + B2 * x2, B * (x1 + B2 * x3)
            d[i + step], d[i + 2 * step] = even_a + odd_a, even_a - odd_a
            d[i + 3 * step], d[i + 4 * step], d[i + 5 * step] = even_b + odd_b, even_b - odd_b, x3

    @compiled
    def evaluated_2(d, at):
        """Two vectors times A: six, in their place."""
        for i in range(at, at + V):
            x0, x1 = d[i], d[i + step]
            d[i + step], d[i + 2 * step] = x0 + A * x1, x0 - A * x1
            d[i + 3 * step], d[i + 4 * step], d[i + 5 * step] = x0 + B * x1, x0 - B * x1, x1

    return seen, {4: made_4, 2: made_2}, {4: evaluated_4, 2: evaluated_2}


(seen_across, made_across, evaluated_across), (seen_down, made_down, evaluated_down) = along(V), along(ROW)


# --- tiles


@compiled
def take_tile(x, c, h, w, i, top, left, size, q, skipped, d):
    """Channels q … q + V − 1 of a tile of size×size pixels, zeros outside the image."""
    zero, n = d.dtype.type(0), min(V, c - q)
    for u in range(size):
        for v in range(size):
            cell = d[u * ROW + v * V : u * ROW + v * V + n]
            if 0 <= top + u < h and 0 <= left + v < w:
                pixel = x[(i * h + top + u - skipped) * w + left + v, q:]
                for j in range(n):
                    cell[j] = pixel[j]
            else:
                for j in range(n):
                    cell[j] = zero


@compiled
def to_planes(d, n, t, q, planes):
    """The 36 cells of a tile, n channels from q on, into tile t of the planes."""
    for p in range(36):
        cell, target = d[p * V :], planes[p, t, q:]
        for j in range(n):
            target[j] = cell[j]


@compiled
def inputs(x, c, geometry, size, first, last, skipped):
    """BᵀxB of every tile in rows first … last − 1 of tiles: (36, tiles, C)."""
    h, w, ph, pw, th, tw = geometry
    planes, d = np.empty((36, (last - first) * tw, c), x.dtype), np.zeros(6 * ROW, x.dtype)
    for t in range((last - first) * tw):
        i, a, b = (first + t // tw) // th, (first + t // tw) % th, t % tw
        for q in range(0, c, V):
            take_tile(x, c, h, w, i, a * size - ph, b * size - pw, 6, q, skipped, d)
            for u in range(6):
                seen_across(d, u * ROW)
            for v in range(6):
                seen_down(d, v * V)
            to_planes(d, min(V, c - q), t, q, planes)
    return planes


def tiles_of(size):
    """The transforms of tiles of size×size outputs: a constant, too."""
    (made_in_row, made_in_column), (evaluated_in_row, evaluated_in_column) = (
        (pair[0][size], pair[1][size]) for pair in ((made_across, made_down), (evaluated_across, evaluated_down))
    )

    @compiled
    def values(x, c, geometry, first, last):
        """AxAᵀ of size×size pixels of every tile: (36, tiles, C)."""
        h, w, _, _, th, tw = geometry
        planes, d = np.empty((36, (last - first) * tw, c), x.dtype), np.zeros(6 * ROW, x.dtype)
        for t in range((last - first) * tw):
            i, a, b = (first + t // tw) // th, (first + t // tw) % th, t % tw
            for q in range(0, c, V):
                take_tile(x, c, h, w, i, a * size, b * size, size, q, 0, d)
                for u in range(size):
                    evaluated_in_row(d, u * ROW)
                for v in range(6):
                    evaluated_in_column(d, v * V)
                to_planes(d, min(V, c - q), t, q, planes)
        return planes

    @compiled
    def outputs(m, o, geometry, first, last, norm, relu, y):
        """AᵀmA of every tile, then scale and shift and ReLU."""
        h, w, _, _, th, tw = geometry
        d, zero = np.zeros(6 * ROW, m.dtype), y.dtype.type(0)
        for t in range((last - first) * tw):
            i, a, b = (first + t // tw) // th, (first + t // tw) % th, t % tw
            for q in range(0, o, V):
                n = min(V, o - q)
                for p in range(36):
                    cell, source = d[p * V :], m[p, t, q:]
                    for j in range(n):
                        cell[j] = source[j]
                for u in range(6):
                    made_in_row(d, u * ROW)
                for v in range(size):
                    made_in_column(d, v * V)
                for u in range(min(size, h - a * size)):
                    for v in range(min(size, w - b * size)):
                        cell, pixel = d[u * ROW + v * V :], y[(i * h + a * size + u) * w + b * size + v, q:]
                        if len(norm):
                            scale, shift = norm[0, q:], norm[1, q:]
                            for j in range(n):
                                value = cell[j] * scale[j] + shift[j]
                                pixel[j] = zero if relu and value < zero else value
                        else:
                            for j in range(n):
                                pixel[j] = cell[j]

    return values, outputs


(values_4, outputs_4), (values_2, outputs_2) = tiles_of(4), tiles_of(2)


@compiled
def values(x, c, geometry, size, first, last):
    return values_4(x, c, geometry, first, last) if size == 4 else values_2(x, c, geometry, first, last)


@compiled
def outputs(m, o, geometry, size, first, last, norm, relu, y):
    if size == 4:
        outputs_4(m, o, geometry, first, last, norm, relu, y)
    else:
        outputs_2(m, o, geometry, first, last, norm, relu, y)


# --- filters


@compiled
def filter_planes(turn, filters, scale, turned, g, step, out):
    """GgGᵀ of filters (R, k, k, S), turned by 180° if asked, times a number for each R: 36 planes (R, S), packed."""
    rows_, k, _, columns = filters.shape
    down, line = np.empty((6, k, columns), filters.dtype), np.empty(columns, filters.dtype)
    block = take(turn)
    while block >= 0:
        for r in range(block * step, min(block * step + step, rows_)):
            down[:] = 0
            for p in range(6):
                for u in range(k):
                    factor = g[p, k - 1 - u if turned else u] * scale[r]
                    for v in range(k):
                        total, source = down[p, v], filters[r, u, k - 1 - v if turned else v]
                        for q in range(columns):
                            total[q] += factor * source[q]
            for p in range(36):
                line[:] = 0
                for v in range(k):
                    factor, source = g[p % 6, v], down[p // 6, v]
                    for q in range(columns):
                        line[q] += factor * source[q]
                put_row(line, r, rows_, columns, out[p])
        block = take(turn)


@compiled
def filter_gradients(turn, dus, scale, g, step, out):
    """GᵀdUG of the sum over lanes, times a number for each filter, turned back: (O, k, k, C)."""
    o, k, _, c = out.shape
    across, total = np.empty((6, k, c), out.dtype), np.empty(c, out.dtype)
    block = take(turn)
    while block >= 0:
        for f in range(block * step, min(block * step + step, o)):
            across[:] = 0
            for p in range(36):
                add_lanes(dus[:, p, f], scale[f], total)
                for v in range(k):
                    line, factor = across[p // 6, v], g[p % 6, v]
                    for q in range(c):
                        line[q] += factor * total[q]
            for u in range(k):
                for v in range(k):
                    line = out[f, k - 1 - u, k - 1 - v]
                    line[:] = 0
                    for p in range(6):
                        factor, source = g[p, u], across[p, v]
                        for q in range(c):
                            line[q] += factor * source[q]
        block = take(turn)


def transformed(weight: Array, scale: Array | None = None) -> Array:
    """The filters' planes, packed: (36, C, O); or, given the scale of each filter, (36, O, C) of the turned filters."""
    turned, k, dtype = scale is not None, weight.shape[2], weight.dtype
    filters = matrix(weight.transpose(0, 2, 3, 1) if turned else weight.transpose(1, 2, 3, 0))
    rows_, columns = len(filters), filters.shape[3]
    wide = padded(columns, dtype.itemsize)
    planes = empty(np, (CELLS, rows_ * wide), dtype)
    if wide > columns:
        planes[:] = 0
    step = -(-rows_ // min(LANES, max(1, weight.size // (k * k) >> 12)))
    by = np.ones(rows_, dtype) if scale is None else scale
    spread(filter_planes, -(-rows_ // step), filters, by, turned, G[k, dtype.name], step, planes)
    return planes


# --- the convolution


@compiled
def convolve(turn, x, c, u, o, norm, relu, y, means, squares, counts, window, size, step):
    """y = Aᵀ[(BᵀxB) ⊙ (GgGᵀ)]A; then scale and shift and ReLU, or the moments of each block."""
    h, w, _, _, _, _, ph, pw, oh, ow = window
    th, tw = -(-oh // size), -(-ow // size)
    total = len(y) // (oh * ow) * th
    block = take(turn)
    while block >= 0:
        first, last = block * step, min(block * step + step, total)
        v = inputs(x, c, (h, w, ph, pw, th, tw), size, first, last, 0)
        m = np.empty((36, (last - first) * tw, o), x.dtype)
        for p in range(36):
            product(v[p], u[p], m[p], c)
        outputs(m, o, (oh, ow, 0, 0, th, tw), size, first, last, norm, relu, y)
        if len(means):
            start, end = first // th * oh + first % th * size, last // th * oh + last % th * size
            counts[block] = (end - start) * ow
            moments(y[start * ow : end * ow], means[block], squares[block])
        block = take(turn)


@compiled
def both_gradients(turn, dz, o, y, norm, x, c, u, dx, dus, mirror, size, step):
    """V = BᵀdyB; dx = Aᵀ[V ⊙ U]A, and dU = V ⊙ AxAᵀ."""
    oh, ow, _, _, _, _, ph, pw, h, w = mirror
    th, tw, lanes = -(-h // size), -(-w // size), len(dus)
    total = len(dx) // (h * w) * th
    lane = take(turn)
    while lane >= 0:
        for block in range(lane, -(-total // step), lanes):
            first, last = block * step, min(block * step + step, total)
            begin = first // th * oh + max(0, first % th * size - ph)  # the rows of dy that are seen
            end = (last - 1) // th * oh + min(oh, (last - 1) % th * size - ph + 6)
            dy = upstream(dz, o, y, norm, begin * ow, end * ow)
            v = inputs(dy, o, (oh, ow, ph, pw, th, tw), size, first, last, begin)
            xs = values(x, c, (h, w, 0, 0, th, tw), size, first, last)
            m = np.empty((36, (last - first) * tw, c), x.dtype)
            for p in range(36):
                product(v[p], u[p], m[p], o)
                product_of_transposed(v[p], xs[p], dus[lane, p], block != lane)
            outputs(m, c, (h, w, 0, 0, th, tw), size, first, last, norm[:0], False, dx)
        lane = take(turn)


def tile_rows(n: int, down: int, across: int, channels: int, size: int) -> int:
    """How many rows of `across` tiles make a block."""
    total = n * down
    most = max(TILE_BYTES // (CELLS * channels * size), TILES)
    return -(-total // rounded(-(-total * across // most), min(LANES, total * across // TILES), total))


def convolved(x: Array, weight: Array, norm: Array, relu: bool, window: Window, statistics: bool):
    """The convolution, norm (2, O) scale and shift of its result, or nothing."""
    n, c, o, (oh, ow), dtype = len(x), x.shape[1], len(weight), window.output, x.dtype
    size = 7 - window.kernel[0]
    u = transformed(weight)
    y, down, across = empty_images(np, (n, o, oh, ow), dtype), -(-oh // size), -(-ow // size)
    step = tile_rows(n, down, across, c + o, x.itemsize)
    blocks = -(-n * down // step)
    counts, (means, squares) = room_for_moments(blocks if statistics else 0, o)
    spread(convolve, blocks, rows(x), c, u, o, norm, relu, rows(y), means, squares, counts, flat(window), size,
           step)  # fmt: skip
    return (y, *merged(means, squares, counts)) if statistics else y


def gradients(
    dz: Array, y: Array, norm: Array, scale: Array, x: Array, weight: Array, window: Window
) -> tuple[Array, Array]:
    """dx, dw of a convolution padded by less than half of its kernel, so that dy is no larger than x."""
    (o, c, k, _), (ph, pw), n = weight.shape, window.padding, len(x)
    mirror = Window.of(window.output, k, 1, (k - 1 - ph, k - 1 - pw))
    u, dx, size, (h, w) = transformed(weight, scale), empty_images(np, x.shape, x.dtype), 7 - k, window.input
    down, across = -(-h // size), -(-w // size)
    step = tile_rows(n, down, across, o + 2 * c, x.itemsize)
    dus = empty(np, (min(LANES, -(-n * down // step)), CELLS, o, c), x.dtype)
    spread(both_gradients, len(dus), rows(dz), o, rows(y), norm, rows(x), c, u, rows(dx), dus, flat(mirror),
           size, step)  # fmt: skip
    dw = empty(np, (o, k, k, c), x.dtype)
    step = -(-o // min(LANES, max(1, o * c >> 12)))
    spread(filter_gradients, -(-o // step), dus, scale, G[k, x.dtype.name], step, dw)
    return dx, dw.transpose(0, 3, 1, 2)
