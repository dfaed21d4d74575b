"""The kernels on NumPy: the textbook, applied to a block of images.

A convolution is im2col and a matrix product. For a whole batch the patches would be far larger than the cache, so
each kernel cuts the batch into blocks (a few images, or a band of rows of one), runs the textbook on a block while
everything it touches stays in the cache, and lets `threads.each` spread the blocks over the cores. Read `block`
first in each function. The blocks follow from the shapes alone, and sums over blocks are added in a fixed order:
the results are the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import numpy as np

from minigrad import threads
from minigrad.layout import Array, Window, empty_images, filter_matrix, images, pixels

PATCH_BYTES = 1 << 20  # patches of one block: half of a core's second-level cache
BLOCK_BYTES = 1 << 18  # elementwise work: three or four arrays of this size at once
WIDE = 512  # elements a ufunc's inner loop should have at least; a row of few channels is too short
LANES = 8  # partial sums over blocks: a fixed number, whatever the number of threads

Block = tuple[slice, slice]  # some images, and some rows of their output


# --- convolution


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    filters = filter_matrix(weight).T  # (KH·KW·C, O)
    y = empty_images(np, (len(x), len(weight), *window.output), x.dtype)

    def block(part: Block) -> None:
        patches = im2col(x, window, part)  # (pixels, KH·KW·C)
        out = pixels(y[part[0], :, part[1]])  # (pixels, O)
        np.matmul(patches, filters, out=out)
        if bias is not None:
            rows, (b,) = widen(out, bias)
            rows += b

    threads.each(block, blocks(len(x), window.output, filters.itemsize * len(filters)))
    return y


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    (kh, kw), (ph, pw) = window.kernel, window.padding
    if window.stride == (1, 1) and ph < kh and pw < kw:
        # Each pixel gathers: the correlation of dy with the filters turned by 180°, inputs and outputs exchanged.
        turned = np.ascontiguousarray(weight[:, :, ::-1, ::-1].transpose(1, 2, 3, 0))  # (C, KH, KW, O)
        return conv2d(
            dy, turned.transpose(0, 3, 1, 2), None, Window.of(window.output, window.kernel, 1, (kh - 1 - ph, kw - 1 - pw))
        )
    filters = filter_matrix(weight)  # (O, KH·KW·C)
    dx = empty_images(np, (len(dy), weight.shape[1], *window.input), dy.dtype)

    def block(part: Block) -> None:
        patches = pixels(dy[part[0]]) @ filters  # (pixels, KH·KW·C)
        col2im(patches, dx[part[0]], window)

    oh, ow = window.output
    threads.each(block, image_blocks(len(dy), window, filters.itemsize * filters.shape[1] * oh * ow))
    return dx


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    (kh, kw), o, c = window.kernel, dy.shape[1], x.shape[1]
    parts = blocks(len(x), window.output, x.itemsize * kh * kw * c)
    lanes = min(LANES, len(parts))
    dw = np.zeros((lanes, o, kh * kw * c), x.dtype)
    db = np.zeros((lanes, o), x.dtype)

    def lane(i: int) -> None:
        product = np.empty_like(dw[i])
        for part in parts[i::lanes]:
            patches = im2col(x, window, part)  # (pixels, KH·KW·C)
            upstream = pixels(dy[part[0], :, part[1]])  # (pixels, O)
            dw[i] += np.matmul(upstream.T, patches, out=product)
            if with_bias:
                db[i] += column_sums(upstream)

    threads.each(lane, range(lanes))
    return dw.sum(0).reshape(o, kh, kw, c).transpose(0, 3, 1, 2), db.sum(0) if with_bias else None


def im2col(x: Array, window: Window, part: Block) -> Array:
    """The patches that a block's output pixels see: (pixels, KH·KW·C). The pixel matrix itself for 1×1."""
    if window.is_pointwise:
        return pixels(x[part[0], :, part[1]])
    (kh, kw), (sh, sw) = window.kernel, window.stride
    band = padded(x, window, part, 0.0)  # (images, rows, columns, C)
    n, _, _, c = band.shape
    rows, ow = part[1].stop - part[1].start, window.output[1]
    image, row, column, channel = band.strides
    # Output pixel (i, j) of image n is a window of band: n, i·sh …, j·sw …. The reshape copies the windows.
    shape, strides = (n, rows, ow, kh, kw, c), (image, row * sh, column * sw, row, column, channel)
    windows: Array = np.ndarray(shape, band.dtype, band, 0, strides)  # as_strided, without its overhead
    return windows.reshape(n * rows * ow, kh * kw * c)


def col2im(patches: Array, dx: Array, window: Window) -> None:
    """Add the patches of whole images back into the pixels they came from. The transpose of im2col."""
    (h, w), (kh, kw), (sh, sw), (ph, pw), (oh, ow) = window
    n, c = dx.shape[:2]
    patches = patches.reshape(n, oh, ow, kh, kw, c)
    canvas = np.zeros((n, h + 2 * ph, w + 2 * pw, c), dx.dtype)
    for u in range(kh):
        for v in range(kw):
            canvas[:, u : u + oh * sh : sh, v : v + ow * sw : sw] += patches[:, :, :, u, v]
    dx.transpose(0, 2, 3, 1)[...] = canvas[:, ph : ph + h, pw : pw + w]


def padded(x: Array, window: Window, part: Block, fill: float) -> Array:
    """The input rows that a block's windows see, with their padding: (images, rows, columns, C), C contiguous."""
    (h, w), (kh, kw), (sh, sw), (ph, pw), (_, ow) = window
    top, bottom = part[1].start * sh - ph, (part[1].stop - 1) * sh - ph + kh
    width = (ow - 1) * sw + kw
    inside = slice(max(top, 0), min(bottom, h))
    columns = min(w, width - pw)
    source = x[part[0]].transpose(0, 2, 3, 1)
    if (ph, pw) == (0, 0) and bottom <= h and width <= w and source[:, inside].flags.c_contiguous:
        return source[:, inside]
    band = np.full((len(source), bottom - top, width, source.shape[3]), fill, x.dtype)
    band[:, inside.start - top : inside.stop - top, pw : pw + columns] = source[:, inside, :columns]
    return band


# --- pooling


def max_pool(x: Array, window: Window) -> Array:
    y = empty_images(np, (*x.shape[:2], *window.output), x.dtype)

    def block(part: Block) -> None:
        band = padded(x, window, part, -np.inf)  # (images, rows, columns, C)
        across = largest(columns_of(band, window))  # (images, rows, OW, C)
        largest(rows_of(across, window, part), out=y[part[0], :, part[1]].transpose(0, 2, 3, 1))

    threads.each(block, blocks(len(x), window.output, x.itemsize * x.shape[1], BLOCK_BYTES))
    return y


def max_pool_dx(dy: Array, x: Array, y: Array, window: Window) -> Array:
    dx = empty_images(np, x.shape, x.dtype)
    (h, w), (ph, pw) = window.input, window.padding

    def block(part: Block) -> None:
        # The maximum across the columns, then down the rows; dy goes back the same way, to the first maximum of
        # each line. That is the window's first maximum in row-major order.
        band = padded(x, window, part, -np.inf)
        across = largest(columns_of(band, window))
        upstream, peak = (a[part[0]].transpose(0, 2, 3, 1) for a in (dy, y))
        d_across, d_band = np.zeros_like(across), np.zeros_like(band)
        to_first_maximum(upstream, peak, rows_of(across, window, part), rows_of(d_across, window, part))
        to_first_maximum(d_across, across, columns_of(band, window), columns_of(d_band, window))
        seen_h, seen_w = min(h, band.shape[1] - ph), min(w, band.shape[2] - pw)
        target = dx[part[0]].transpose(0, 2, 3, 1)
        if (seen_h, seen_w) != (h, w):
            target[...] = 0
        target[:, :seen_h, :seen_w] = d_band[:, ph : ph + seen_h, pw : pw + seen_w]

    threads.each(block, image_blocks(len(x), window, x.itemsize * x.shape[1] * h * w, BLOCK_BYTES))
    return dx


def columns_of(band: Array, window: Window) -> list[Array]:
    """For each column v of the kernel, the band's columns that it falls on: views (images, rows, OW, C)."""
    (_, kw), (_, sw), (_, ow) = window.kernel, window.stride, window.output
    return [band[:, :, v : v + (ow - 1) * sw + 1 : sw] for v in range(kw)]


def rows_of(band: Array, window: Window, part: Block) -> list[Array]:
    """For each row u of the kernel, the band's rows that it falls on: views (images, output rows, …, C)."""
    (kh, _), (sh, _) = window.kernel, window.stride
    return [band[:, u : u + (part[1].stop - part[1].start - 1) * sh + 1 : sh] for u in range(kh)]


def largest(taps: list[Array], out: Array | None = None) -> Array:
    """The elementwise maximum of all taps."""
    if len(taps) == 1:
        out = np.empty_like(taps[0]) if out is None else out
        out[...] = taps[0]
        return out
    out = np.maximum(taps[0], taps[1], out=out)
    for tap in taps[2:]:
        np.maximum(out, tap, out=out)
    return out


def to_first_maximum(upstream: Array, peak: Array, taps: list[Array], d_taps: list[Array]) -> None:
    """Add `upstream` to the gradient of the first tap that equals the peak, element by element."""
    left = upstream.copy()
    for tap, d_tap in zip(taps, d_taps, strict=True):
        taken = left * (tap == peak)
        d_tap += taken
        left -= taken


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    y = empty_images(np, (*x.shape[:2], *window.output), x.dtype)
    share = reciprocal_counts(window, count_padding, x.dtype)

    def block(part: Block) -> None:
        band = padded(x, window, part, 0.0)
        across = sum_of(columns_of(band, window))
        down = sum_of(rows_of(across, window, part))
        np.multiply(down, share[part[1]], out=y[part[0], :, part[1]].transpose(0, 2, 3, 1))

    threads.each(block, blocks(len(x), window.output, x.itemsize * x.shape[1], BLOCK_BYTES))
    return y


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    (h, w), (kh, kw), _, (ph, pw), (oh, ow) = window
    dx = empty_images(np, (*dy.shape[:2], h, w), dy.dtype)
    share = reciprocal_counts(window, count_padding, dy.dtype)
    (sh, sw) = window.stride
    height, width = max(h + ph, (oh - 1) * sh + kh), max(w + pw, (ow - 1) * sw + kw)

    def block(part: Block) -> None:
        spread = dy[part[0]].transpose(0, 2, 3, 1) * share
        n, _, _, c = spread.shape
        d_across = np.zeros((n, height, ow, c), dy.dtype)
        for d_row in rows_of(d_across, window, (part[0], slice(0, oh))):
            d_row += spread
        d_band = np.zeros((n, height, width, c), dy.dtype)
        for d_column in columns_of(d_band, window):
            d_column += d_across
        dx[part[0]].transpose(0, 2, 3, 1)[...] = d_band[:, ph : ph + h, pw : pw + w]

    threads.each(block, image_blocks(len(dy), window, dy.itemsize * dy.shape[1] * h * w, BLOCK_BYTES))
    return dx


def sum_of(taps: list[Array]) -> Array:
    """The elementwise sum of all taps, in a new array."""
    total = taps[0].copy()
    for tap in taps[1:]:
        total += tap
    return total


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
    matrix = pixels(x)
    parts = row_blocks(matrix)
    means, squares = np.empty((2, len(parts), matrix.shape[1]))

    def block(i: int) -> None:
        # Sums of x − shift, not of x: Σx² − (Σx)²/n would lose the variance of a channel far from zero.
        rows = matrix[parts[i]]
        shift = column_sums(rows) / len(rows)
        wide, (tiled,) = widen(rows, shift)
        centred = wide - tiled
        first = column_sums(centred).reshape(-1, matrix.shape[1]).sum(0, dtype=np.float64)
        centred *= centred
        second = column_sums(centred).reshape(-1, matrix.shape[1]).sum(0, dtype=np.float64)
        means[i] = shift + first / len(rows)
        squares[i] = second - first * first / len(rows)

    threads.each(block, range(len(parts)))
    sizes = np.array([[part.stop - part.start] for part in parts], dtype=np.float64)
    mean = (sizes * means).sum(0) / len(matrix)
    return mean, (squares + sizes * (means - mean) ** 2).sum(0) / len(matrix)


def batch_norm(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool
) -> Array:
    scale, shift = scale_and_shift(mean, var, gamma, beta, eps)
    y = empty_images(np, x.shape, x.dtype)
    source, target = pixels(x), pixels(y)

    def block(part: slice) -> None:
        out, (s, t) = widen(target[part], scale, shift)
        np.multiply(source[part].reshape(out.shape), s, out=out)
        out += t
        if relu:
            np.maximum(out, 0, out=out)

    threads.each(block, row_blocks(source))
    return y


def batch_norm_dx(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    scale, shift = scale_and_shift(mean, var, gamma, beta, eps)
    centre = mean.astype(x.dtype)
    dx = empty_images(np, x.shape, x.dtype)
    source, upstream, target = pixels(x), pixels(dy), pixels(dx)
    c = source.shape[1]
    parts = row_blocks(source)
    sums = np.empty((2, len(parts), c))

    def reduce(i: int) -> None:
        """dz, the gradient before the ReLU, into dx; Σ dz and Σ dz·(x − mean)."""
        dz, (s, t, m) = widen(target[parts[i]], scale, shift, centre)
        rows, up = source[parts[i]].reshape(dz.shape), upstream[parts[i]].reshape(dz.shape)
        if relu:
            z = rows * s
            z += t
            np.multiply(up, z > 0, out=dz)
        else:
            dz[...] = up
        product = rows - m
        product *= dz
        for total, values in zip(sums[:, i], (dz, product), strict=True):
            total[...] = column_sums(values).reshape(-1, c).sum(0, dtype=np.float64)

    threads.each(reduce, range(len(parts)))
    dbeta, dot = sums.sum(1)
    dgamma = dot / np.sqrt(var + eps)
    # dx = scale · (dz − mean(dz) − (x − mean) · mean(dz·(x − mean)) / (var + eps)), as dz·scale + x·slope + offset
    n = len(source) if through_statistics else np.inf
    slope64 = -(gamma / np.sqrt(var + eps)) * dot / (n * (var + eps))
    offset = (-(gamma / np.sqrt(var + eps)) * dbeta / n - slope64 * mean).astype(x.dtype)
    slope = slope64.astype(x.dtype)

    def combine(part: slice) -> None:
        dz, (s, a, b) = widen(target[part], scale, slope, offset)
        dz *= s
        if through_statistics:
            linear = source[part].reshape(dz.shape) * a
            linear += b
            dz += linear

    threads.each(combine, parts)
    return dx, dgamma.astype(gamma.dtype), dbeta.astype(beta.dtype)


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

    threads.each(block, row_blocks(source))
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

    threads.each(block, row_blocks(source))
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

    threads.each(block, blocks(n, (h, w), y.itemsize * y.shape[1], BLOCK_BYTES))
    return y


def add(a: Array, b: Array, out: Array | None) -> Array:
    if a.ndim != 4:
        return np.add(a, b, out=out)
    total = empty_images(np, a.shape, a.dtype) if out is None else out

    def block(part: Block) -> None:
        x, y, z = (m[part[0], :, part[1]].transpose(0, 2, 3, 1) for m in (a, b, total))
        np.add(x, y, out=z)

    threads.each(block, blocks(len(a), a.shape[2:], a.itemsize * a.shape[1], BLOCK_BYTES))
    return total


# --- blocks


def blocks(n: int, size: tuple[int, int], bytes_per_pixel: int, budget: int = PATCH_BYTES) -> list[Block]:
    """Cut n images of (rows, columns) into blocks within the budget: some whole images, or bands of one image.

    There are at least eight where the work is worth sharing, so that one image keeps several cores busy.
    """
    rows, columns = size
    area = rows * columns
    wanted = max(min(budget // bytes_per_pixel, n * area // 8), 64)  # pixels of one block
    if wanted >= area:
        return [(part, slice(0, rows)) for part in even(n, wanted // area)]
    bands = even(rows, max(wanted // columns, 1))
    return [(slice(i, i + 1), band) for i in range(n) for band in bands]


def image_blocks(n: int, window: Window, bytes_per_image: int, budget: int = PATCH_BYTES) -> list[Block]:
    """Blocks of whole images, for kernels whose bands would overlap in their result."""
    wanted = min(budget // bytes_per_image, n // 8)
    return [(part, slice(0, window.output[0])) for part in even(n, max(wanted, 1))]


def row_blocks(matrix: Array) -> list[slice]:
    """Cut the rows of a pixel matrix into blocks of about BLOCK_BYTES, a whole number of wide rows each."""
    n, c = matrix.shape
    grain = max(WIDE // c, 1)
    wanted = max(min(BLOCK_BYTES // (c * matrix.itemsize), n // 8), 64)
    step = -(-wanted // grain) * grain
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def even(n: int, most: int) -> list[slice]:
    """0 … n in as few parts of at most `most` as possible, of nearly equal size."""
    count = -(-n // most)
    ends = [n * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def widen(matrix: Array, *vectors: Array) -> tuple[Array, list[Array]]:
    """Several pixels of few channels seen as one long row, and per-channel vectors repeated to match."""
    n, c = matrix.shape
    repeat = max(WIDE // c, 1)
    if repeat == 1 or n % repeat or not matrix.flags.c_contiguous:
        return matrix, list(vectors)
    return matrix.reshape(n // repeat, repeat * c), [np.tile(vector, repeat) for vector in vectors]


def column_sums(matrix: Array) -> Array:
    """Σ over rows, as a product with ones: BLAS reads a matrix several times faster than ufunc.reduce does."""
    return np.ones(len(matrix), matrix.dtype) @ matrix


# --- memory


def _keep_memory() -> None:
    """Keep freed memory in the process: a training step allocates the same arrays again and again, and fresh
    pages from the kernel cost more than the arithmetic on them. glibc only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)


_keep_memory()
