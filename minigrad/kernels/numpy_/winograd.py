"""3×3 convolutions with fewer multiplications: Winograd's F(2×2, 3×3).

Lavin, Gray: Fast algorithms for convolutional neural networks, arXiv:1509.09308, section 4.

In one dimension. A filter g of three cells makes two neighbouring outputs from four inputs d:

    y0 = d0·g0 + d1·g1 + d2·g2        y1 = d1·g0 + d2·g1 + d3·g2        six multiplications

and these are the same numbers from four (the paper has the signs of m3 turned):

    m0 = (d0 − d2) · g0               m1 = (d1 + d2) · (g0 + g1 + g2)/2
    m3 = (d3 − d1) · g2               m2 = (d2 − d1) · (g0 − g1 + g2)/2
    y0 = m0 + m1 + m2                 y1 = m1 − m2 + m3

The sums of g are made once, those of d and m are cheap. With matrices that hold the signs: y = Aᵀ[(Bᵀd) ⊙ (Gg)].

In two dimensions. Let d0 … d3 be rows of an image, g0 … g2 the rows of a filter, and each of the four products a
convolution along the rows, for which the same formula holds: y = Aᵀ[(BᵀdB) ⊙ (GgGᵀ)]A. A tile of 4×4 inputs gives
2×2 outputs with 16 multiplications instead of 36. Tiles overlap by two pixels.

With channels. Each of the 16 products is summed over C input channels, for all tiles and O filters: 16 matrix
products (tiles, C) · (C, O), one for each cell (i, j) of the tile. So everything lies in 16 planes of pixel matrices,
and a transform adds whole planes. A ufunc pays for every stretch of memory, so stretches are made long first: even
and odd columns are copied apart, and neighbours in a plane are then neighbours in memory.

The backward. Through the convolution of dy with the turned filters, whose outputs are dx (as in
`conv.both_gradients`), with V = BᵀdyB: dx = Aᵀ[V ⊙ U]A, so that dU = V ⊙ AxAᵀ and the gradient of the turned
filters is GᵀdUG. V serves both.

Rounding in float32, against float64 and relative to the largest value, at 160 ReLU'd channels of 14×14 and 320
filters: y 4.1e-7 (im2col 3.5e-7), dx 8.8e-7 (6.0e-7), dw 3.6e-7 (2.0e-7). F(4×4, 3×3), with 36 products where this
takes 64, errs by 7.6e-6 and was no faster at that size: it adds more, and images of 14×14 or 7×7 do not fill its tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from minigrad.layout import Array, Pair, Window, empty, empty_images, pixels

G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
GG = np.kron(G, G)  # (16, 9): G g Gᵀ for g as a vector
FILTERS = 16  # so many at a time are transformed


def pays(x_shape: tuple[int, ...], filters: int, window: Window) -> bool:
    """Is it faster than im2col? From the shapes alone, as measured on one core and on two."""
    if window.kernel != (3, 3) or window.stride != (1, 1):
        return False
    (oh, ow), (rows, columns) = window.output, tiles(window.output)
    saved = x_shape[0] * (9 * oh * ow - 16 * rows * columns)  # multiplications for each pair of channel and filter
    return min(x_shape[1], filters) >= 48 and saved >= 1500  # to transform the pair's g takes as long as 1,000 or so


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window, finish: Finish | None = None) -> Array:
    """y = Aᵀ[(BᵀxB) ⊙ (GgGᵀ)]A, block by block"""
    u = filter_planes(weight.transpose(2, 3, 1, 0).reshape(9, *weight.shape[1::-1]))  # (16, C, O)
    y = empty_images(np, (len(x), len(weight), *window.output), x.dtype)
    bias_row = None if bias is None else repeated(bias)
    parts = tile_blocks(len(x), window.output, x.itemsize * sum(u.shape[1:]))

    def block(i: int) -> None:
        images, band = parts[i]
        inner, seen = rows_of_tiles(window, parts[i])
        v = input_planes(rows(x, (images, seen)), inner, window, parts[i])  # (16, tiles, C)
        m = np.matmul(v, u, out=scratch("m", (16, v.shape[1], u.shape[2]), v.dtype))  # (16, tiles, O)
        if bias_row is not None:
            wide, b = widen(m[4 * 1 + 1], bias_row)  # cell (1, 1): its product is in all four outputs, once
            wide += b
        outputs(m, y, parts[i])
        if finish is not None:
            finish(i, pixels(y[images, :, twice(band)]))

    each(block, range(len(parts)))
    return y


def conv2d_backward(
    upstream: Source, x: Array, weight: Array, window: Window, with_bias: bool
) -> tuple[Array, Array, Array | None]:
    """dx, dw, db of a convolution with a padding of 0 or 1, so that dy is no larger than x."""
    (o, c), (ph, pw) = weight.shape[:2], window.padding
    mirror = Window.of(window.output, 3, 1, (2 - ph, 2 - pw))
    u = filter_planes(weight.transpose(2, 3, 0, 1).reshape(9, o, c)[::-1])  # (16, O, C), of the turned filters
    dx = empty_images(np, x.shape, x.dtype)
    parts = tile_blocks(len(x), window.input, x.itemsize * (o + c))
    lanes = min(LANES, len(parts))
    du, db = empty(np, (lanes, *u.shape), x.dtype), np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        for part in parts[i::lanes]:
            inner, seen = rows_of_tiles(mirror, part)
            dy = upstream((part[0], seen))  # (images, rows, columns, O)
            v = input_planes(dy, inner, mirror, part)  # (16, tiles, O)
            m = np.matmul(v, u, out=scratch("m", (16, v.shape[1], c), v.dtype))  # (16, tiles, C)
            outputs(m, dx, part)
            dm = output_gradients(x, part, m)
            multiply(v.transpose(0, 2, 1), dm, du[i], add=part is not parts[i])
            if with_bias:
                own = slice(2 * part[1].start - seen.start, 2 * part[1].stop - seen.start)  # no block sees less
                db[i] += column_sums(matrix(dy[:, own]))

    each(lane, range(lanes))
    return dx, filter_gradients(du), db.sum(0) if with_bias else None


# --- tiles


def tiles(size: Pair) -> Pair:
    """Rows and columns of tiles of 2×2 outputs; the last ones may stick out."""
    return -(-size[0] // 2), -(-size[1] // 2)


def tile_blocks(n: int, size: Pair, bytes_per_pixel: int) -> tuple[Block, ...]:
    """Some images, and some rows of tiles of them, whose 16 planes stay in the cache."""
    return cut(n, tiles(size), 16 * bytes_per_pixel, PATCH_BYTES, least=128)


def extent(part: Block, size: Pair) -> tuple[int, int, int]:
    """Images, rows of tiles and columns of tiles in a block of outputs of this size."""
    return part[0].stop - part[0].start, part[1].stop - part[1].start, tiles(size)[1]


def twice(rows: slice) -> slice:
    """The rows of pixels that rows of tiles are about."""
    return slice(2 * rows.start, 2 * rows.stop)


def corners(x: Array, part: Block) -> Iterator[tuple[int, int, Array]]:
    """(a, b) and pixel (a, b) of each tile's 2×2 in a block: (images, rows, columns, C), a view of what is inside."""
    source = x[part[0], :, twice(part[1])].transpose(0, 2, 3, 1)
    for a in range(2):
        for b in range(2):
            yield a, b, source[:, a::2, b::2]


# --- d, m and y of the 1-D formula; below each, how it makes planes


def input_sums(d: Sequence[Array], out: Sequence[Array]) -> None:
    """Bᵀd"""
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[3], d[1], out=out[3])


def rows_of_tiles(window: Window, part: Block) -> tuple[slice, slice]:
    """Which of the rows that a block's tiles cover are inside the image: among them, and in the image."""
    count = 2 * (part[1].stop - part[1].start) + 2
    return inside(2 * part[1].start - window.padding[0], 1, count, window.input[0])


def input_planes(seen: Array, inner: slice, window: Window, part: Block) -> Array:
    """BᵀdB of the tiles in a block: (16, tiles, C).

    seen, inner   the image's pixels that they see, (images, rows, columns, C), and where these are: `rows_of_tiles`
    """
    (n, rows, columns), c = extent(part, window.output), seen.shape[3]
    band = scratch("band", (2, n, 2 * rows + 2, columns + 1, c), seen.dtype)  # even and odd columns, zeros around them
    band[:, :, : inner.start], band[:, :, inner.stop :] = 0, 0
    for odd, half in enumerate(band):
        across, seen_columns = inside(odd - window.padding[1], 2, columns + 1, window.input[1])
        half[:, :, : across.start], half[:, :, across.stop :] = 0, 0
        half[:, inner, across] = seen[:, :, seen_columns]
    sums = scratch("sums", (4, 2, n, rows, columns + 1, c), seen.dtype)  # Bᵀd
    input_sums([band[:, :, i : i + 2 * rows - 1 : 2] for i in range(4)], sums)
    planes = scratch("planes", (4, 4, n, rows, columns, c), seen.dtype)
    even_odd = [sums[:, j % 2, :, :, j // 2 : j // 2 + columns] for j in range(4)]  # column j of each tile
    input_sums(even_odd, planes.swapaxes(0, 1))
    return planes.reshape(16, n * rows * columns, c)


def inside(first: int, step: int, count: int, size: int) -> tuple[slice, slice]:
    """Which of the cells first, first + step, … are inside 0 … size: among the cells, and in the image."""
    low = max(-(first // step), 0)
    high = max(min((size - 1 - first) // step + 1, count), low)
    start = first + low * step
    return slice(low, high), slice(start, start + (high - low) * step, step)


def output_sums(m: Array) -> None:
    """Aᵀm, in place: y0 in m[0], y1 in m[3]."""
    m[0] += m[1]
    m[0] += m[2]
    m[3] += m[1]
    m[3] -= m[2]


def outputs(planes: Array, y: Array, part: Block) -> None:
    """AᵀmA into a block of y. The planes (16, tiles, O) are overwritten."""
    m = planes.reshape(4, 4, *extent(part, y.shape[2:]), y.shape[1])
    output_sums(m)
    output_sums(m[::3].swapaxes(0, 1))
    for a, b, pixel in corners(y, part):
        pixel[...] = m[3 * a, 3 * b, :, : pixel.shape[1], : pixel.shape[2]]


def output_spread(y: Array, out: Array) -> None:
    """Ay, the transpose of `output_sums`."""
    out[0] = y[0]
    np.add(y[0], y[1], out=out[1])
    np.subtract(y[0], y[1], out=out[2])
    out[3] = y[1]


def output_gradients(y: Array, part: Block, planes: Array) -> Array:
    """AyAᵀ of a block of y, into the planes (16, tiles, O)."""
    shape = (*extent(part, y.shape[2:]), y.shape[1])
    apart = scratch("apart", (2, 2, *shape), y.dtype)
    for a, b, pixel in corners(y, part):
        _, h, w, _ = pixel.shape
        apart[a, b, :, h:], apart[a, b, :, :, w:] = 0, 0
        apart[a, b, :, :h, :w] = pixel
    sums = scratch("sums", (4, 2, *shape), y.dtype)
    output_spread(apart, sums)
    output_spread(sums.swapaxes(0, 1), planes.reshape(4, 4, *shape).swapaxes(0, 1))
    return planes


def filter_planes(taps: Array) -> Array:
    """GgGᵀ: (16, I, J) from the nine cells of the filters (9, I, J)."""
    _, i, j = taps.shape
    u = empty(np, (16, i * j), taps.dtype)
    gg = GG.astype(taps.dtype)

    def block(part: slice) -> None:
        np.matmul(gg, taps[:, part].reshape(9, -1), out=u[:, part.start * j : part.stop * j])

    each(block, even(i, FILTERS))
    return u.reshape(16, i, j)


def filter_gradients(du: Array) -> Array:
    """GᵀdUG of the sum over lanes, turned back: (O, C, KH, KW) from (lanes, 16, O, C)."""
    lanes, _, o, c = du.shape
    dw = empty(np, (o, 9, c), du.dtype)
    gg = np.tile(GG.T.astype(du.dtype), lanes)  # (9, lanes·16): the product sums over lanes too
    planes = du.reshape(lanes * 16, o * c)

    def block(part: slice) -> None:
        taps = gg @ planes[:, part.start * c : part.stop * c]
        dw[part] = taps.reshape(9, -1, c)[::-1].transpose(1, 0, 2)

    each(block, even(o, FILTERS))
    return dw.reshape(o, 3, 3, c).transpose(0, 3, 1, 2)
