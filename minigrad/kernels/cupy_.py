"""The kernel table for CuPy arrays, in array code that NumPy understands as well.

Everything below computes on one of two C-ordered forms, because CuPy allocates every result in C order:

    matrix  (N·H·W, C)      `pixels(x)`, for products and column statistics
    grid    (N, H, W, C)    the same memory with its image rows and columns, for windows

Both turn into channels-last images by `images`, without a copy. Nothing here waits for the device, and nothing
scatters: windows that overlap are added tap by tap, in row-major order, so every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minigrad.backend import array_module
from minigrad.layout import Array, Window, empty_images, filter_matrix, images, pixels

PATCH_BYTES = 256 * 2**20  # a k×k patch matrix is k² times its input: blocks of images keep it below this


def grid(x: Array) -> Array:
    """(N, C, H, W) as (N, H, W, C) in C order: a view when x is channels-last."""
    n, c, h, w = x.shape
    return pixels(x).reshape(n, h, w, c)


def ungrid(g: Array) -> Array:
    """(N, H, W, C) as channels-last images (N, C, H, W)."""
    return images(g, *g.shape[:3])


# ---- Windows ----


def padded(xp: Any, g: Array, window: Window, fill: float) -> Array:
    """A copy of the grid with its padding around it, large enough for every window."""
    n, h, w, c = g.shape
    top, left = window.padding
    result = xp.full((n, *padded_size(window), c), fill, g.dtype)
    result[:, top : top + h, left : left + w] = g
    return result


def padded_size(window: Window) -> tuple[int, int]:
    """Rows and columns to hold the image and every window; in ceil mode the last ones reach beyond the padding."""
    height, width = (
        max(p + size, (out - 1) * s + k)
        for size, k, s, p, out in zip(
            window.input, window.kernel, window.stride, window.padding, window.output, strict=True
        )
    )
    return height, width


def taps(window: Window) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """Each cell (u, v) of the kernel in row-major order, with the index of what it sees in a padded grid.

    That part, (N, OH, OW, C), holds the input under cell (u, v) for all stops of the window.
    """
    (sh, sw), (oh, ow) = window.stride, window.output
    for u in range(window.kernel[0]):
        for v in range(window.kernel[1]):
            yield u, v, (slice(None), slice(u, u + sh * (oh - 1) + 1, sh), slice(v, v + sw * (ow - 1) + 1, sw))


def cropped(g: Array, window: Window) -> Array:
    """The padded grid without its padding."""
    (h, w), (top, left) = window.input, window.padding
    return g[:, top : top + h, left : left + w]


# ---- Convolution ----


def im2col(x: Array, window: Window) -> Array:
    """The patch matrix (N·OH·OW, KH·KW·C): in each row what one output pixel sees."""
    if window.is_pointwise:
        return pixels(x)
    xp = array_module(x)
    g = padded(xp, grid(x), window, 0)
    (n, _, _, c), (sn, sh, sw, sc) = g.shape, g.strides
    (oh, ow), (kh, kw), (down, across) = window.output, window.kernel, window.stride
    patches = xp.lib.stride_tricks.as_strided(g, (n, oh, ow, kh, kw, c), (sn, sh * down, sw * across, sh, sw, sc))
    return patches.reshape(n * oh * ow, kh * kw * c)


def blocks(n: int, channels: int, window: Window, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """The batch in blocks whose patch matrix stays below PATCH_BYTES: (its images, its rows of output pixels)."""
    (oh, ow), (kh, kw) = window.output, window.kernel
    step = max(1, PATCH_BYTES // (oh * ow * kh * kw * channels * itemsize))
    for first in range(0, n, n if window.is_pointwise else step):
        last = min(n, first + (n if window.is_pointwise else step))
        yield slice(first, last), slice(first * oh * ow, last * oh * ow)


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """patches @ filtersᵀ + bias"""
    xp, n = array_module(x), x.shape[0]
    (oh, ow), filters = window.output, filter_matrix(weight).T  # (KH·KW·C, O)
    y = xp.empty((n * oh * ow, weight.shape[0]), x.dtype)
    for batch, rows in blocks(n, x.shape[1], window, x.dtype.itemsize):
        xp.matmul(im2col(x[batch], window), filters, out=y[rows])
    if bias is not None:
        y += bias
    return images(y, n, oh, ow)


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    """dy @ filters gives the gradient of every patch; each tap of the patches goes back to where it was read."""
    xp, dy_rows, filters = array_module(dy), pixels(dy), filter_matrix(weight)
    n, c, (h, w) = dy.shape[0], weight.shape[1], window.input
    if window.is_pointwise:
        return images(dy_rows @ filters, n, h, w)
    dx = xp.empty((n, h, w, c), dy.dtype)
    for batch, rows in blocks(n, c, window, dy.dtype.itemsize):
        dpatches = (dy_rows[rows] @ filters).reshape(-1, *window.output, *window.kernel, c)
        g = xp.zeros((dpatches.shape[0], *padded_size(window), c), dy.dtype)
        for u, v, seen in taps(window):
            part = g[seen]
            part += dpatches[:, :, :, u, v]
        dx[batch] = cropped(g, window)
    return ungrid(dx)


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dw = dyᵀ @ patches, db = column sums of dy"""
    xp, dy_rows = array_module(x), pixels(dy)
    n, c, o = x.shape[0], x.shape[1], dy.shape[1]
    dw = xp.zeros((o, window.kernel[0] * window.kernel[1] * c), x.dtype)
    for batch, rows in blocks(n, c, window, x.dtype.itemsize):
        dw += dy_rows[rows].T @ im2col(x[batch], window)
    db = column_sums(dy_rows).astype(dy.dtype) if with_bias else None
    return images(dw, o, *window.kernel), db


# ---- Pooling ----


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients that are needed."""
    dx = conv2d_dx(dy, weight, window) if needs_dx else None
    return dx, *(conv2d_dw(dy, x, window, with_bias) if needs_dw or with_bias else (None, None))


def max_pool(x: Array, window: Window) -> Array:
    """The maximum across the columns, then down the rows."""
    return max_pool_winners(x, window)[0]


def max_pool_winners(x: Array, window: Window) -> tuple[Array, list[Array]]:
    """The same, and which cell had the maximum first."""
    across, first_across = maximum_along(grid(x), window, 1)
    y, first_down = maximum_along(across, window, 0)
    return ungrid(y), [ungrid(first_across), ungrid(first_down)]


def maximum_along(g: Array, window: Window, axis: int) -> tuple[Array, Array]:
    """The maximum of every window along one axis of a grid, and the number of the cell that has it first.

    `maximum` lets NaN through.
    """
    xp, (size, _, s, p, out) = array_module(g), (pair[axis] for pair in window)
    lead = (slice(None),) * (1 + axis)
    room = [(0, 0)] * 4
    room[1 + axis] = (p, max(0, (out - 1) * s + window.kernel[axis] - p - size))
    g = xp.pad(g, room, constant_values=-float("inf"))
    stops = [1, 1, 1, 1]
    stops[1 + axis] = out
    inside = xp.maximum(p - s * xp.arange(out), 0).astype("int8").reshape(stops)  # padding before it is no winner
    best = g[(*lead, slice(0, (out - 1) * s + 1, s))].copy()
    first = xp.zeros(best.shape, "int8") + inside
    for v in range(1, window.kernel[axis]):
        cell = g[(*lead, slice(v, v + (out - 1) * s + 1, s))]
        first = xp.where(cell > best, xp.int8(v), first)
        best = xp.maximum(best, cell)
    return best, first


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    """dy goes to the winning row, then to the winning column in it."""
    across, down = (grid(w) for w in winners)
    return ungrid(hand_along(hand_along(grid(dy), down, window, 0), across, window, 1))


def hand_along(dy: Array, first: Array, window: Window, axis: int) -> Array:
    """The transpose of `maximum_along`."""
    xp, (size, k, s, p, out) = array_module(dy), (pair[axis] for pair in window)
    lead, shape = (slice(None),) * (1 + axis), list(dy.shape)
    shape[1 + axis] = max(p + size, (out - 1) * s + k)
    dx = xp.zeros(shape, dy.dtype)
    for v in range(k):
        cell = dx[(*lead, slice(v, v + (out - 1) * s + 1, s))]
        cell += xp.where(first == v, dy, 0)  # not dy · mask: ∞ · 0 would be NaN
    return xp.ascontiguousarray(dx[(*lead, slice(p, p + size))])


def divisors(xp: Any, window: Window, count_padding: bool, dtype: Any) -> Array:
    """(OH, OW, 1): the cells of each window inside the image, or inside the padded image."""
    along = []
    for size, k, s, p, out in zip(
        window.input, window.kernel, window.stride, window.padding, window.output, strict=True
    ):
        low, high = (-p, size + p) if count_padding else (0, size)
        starts = [i * s - p for i in range(out)]
        along.append([min(start + k, high) - max(start, low) for start in starts])
    rows, columns = (xp.asarray(counts, dtype=dtype) for counts in along)
    return (rows[:, None] * columns[None, :])[:, :, None]


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    """The sum of the taps, padding being zero, over the divisors."""
    xp = array_module(x)
    g = padded(xp, grid(x), window, 0)
    y = xp.zeros((x.shape[0], *window.output, x.shape[1]), x.dtype)
    for _, _, seen in taps(window):
        y += g[seen]
    y /= divisors(xp, window, count_padding, x.dtype)
    return ungrid(y)


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    """Every tap gets the same share of dy."""
    xp, (n, c, _, _) = array_module(dy), dy.shape
    share = grid(dy) / divisors(xp, window, count_padding, dy.dtype)
    g = xp.zeros((n, *padded_size(window), c), dy.dtype)
    for _, _, seen in taps(window):
        part = g[seen]
        part += share
    return ungrid(xp.ascontiguousarray(cropped(g, window)))


# ---- Batch norm: statistics and their arithmetic in float64, images in their own dtype ----


def column_sums(matrix: Array) -> Array:
    """(M, C) summed over its rows, in float64: float32 loses digits over many pixels."""
    return matrix.sum(axis=0, dtype=array_module(matrix).float64)


def statistics(x: Array) -> tuple[Array, Array]:
    """Two passes: the mean, then the mean square of what is left, less the square of its own small mean."""
    matrix = pixels(x)
    m = matrix.shape[0]
    rounded_mean = (column_sums(matrix) / m).astype(x.dtype)
    centred = matrix - rounded_mean
    rest = column_sums(centred) / m
    centred *= centred
    return rounded_mean + rest, column_sums(centred) / m - rest * rest


def scaling(gamma: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """1 / √(var + eps) and gamma / √(var + eps), both (C,) and float64."""
    xp = array_module(var)
    inverse_std = 1 / xp.sqrt(var.astype(xp.float64) + eps)
    return inverse_std, gamma * inverse_std


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """Centre first: x · scale + shift would lose digits where the mean is large."""
    (n, _, h, w), dtype = x.shape, x.dtype
    y = pixels(x) - mean.astype(dtype)
    y *= scaling(gamma, var, eps)[1].astype(dtype)
    y += beta.astype(dtype)
    if relu:
        array_module(x).maximum(y, 0, out=y)
    return images(y, n, h, w)


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
    """The reference's formula with x̂ written as centred · inverse_std, where column sums carry the factors."""
    xp, (n, _, h, w), dtype = array_module(x), x.shape, x.dtype
    inverse_std, scale = scaling(gamma, var, eps)
    g, centred = pixels(dy), pixels(x) - mean.astype(dtype)
    if relu:  # the forward's own steps, so that both cut at the same pixels
        y = centred * scale.astype(dtype)
        y += beta.astype(dtype)
        g = xp.where(y > 0, g, 0)
    dbeta = column_sums(g)
    dgamma = column_sums(g * centred) * inverse_std
    if through_statistics:
        m = g.shape[0]
        centred *= (inverse_std * dgamma / m).astype(dtype)
        dx = g - (dbeta / m).astype(dtype)
        dx -= centred
        dx *= scale.astype(dtype)
    else:
        dx = g * scale.astype(dtype)
    return images(dx, n, h, w), dgamma.astype(dtype), dbeta.astype(dtype)


# ---- Convolution, batch norm and ReLU together ----


def conv2d_relu(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """max(0, conv2d)"""
    return ungrid(array_module(x).maximum(grid(conv2d(x, weight, bias, window)), 0))


def conv2d_statistics(x: Array, weight: Array, bias: Array | None, window: Window) -> tuple[Array, Array, Array]:
    """conv2d, and the statistics of its result"""
    y = conv2d(x, weight, bias, window)
    return y, *statistics(y)


def conv_bn_relu_backward(
    dzs: list[Array], x: Array, weight: Array, window: Window, y: Array, mean: Array, var: Array, gamma: Array,
    beta: Array, eps: float, needs_dx: bool, with_bias: bool,
) -> tuple[Array | None, Array | None, Array | None, Array, Array]:  # fmt: skip
    """Back through ReLU and batch norm, then through the convolution"""
    dy, dgamma, dbeta = batch_norm_dx(concat(dzs), y, mean, var, gamma, beta, eps, True, True)
    return *conv2d_backward(dy, x, weight, window, needs_dx, True, with_bias), dgamma, dbeta


# ---- Local response normalisation ----


def neighbour_sums(matrix: Array, below: int, above: int) -> Array:
    """Column c plus the `below` columns before it and the `above` columns after it, clipped at the ends."""
    sums = matrix.copy()
    for distance in range(1, below + 1):
        part = sums[:, distance:]
        part += matrix[:, :-distance]
    for distance in range(1, above + 1):
        part = sums[:, :-distance]
        part += matrix[:, distance:]
    return sums


def lrn_base(matrix: Array, size: int, alpha: float, k: float) -> Array:
    """k + alpha/size · Σ x² over the neighbours; an even size has its extra channel below."""
    base = neighbour_sums(matrix * matrix, size // 2, (size - 1) // 2)
    base *= alpha / size
    base += k
    return base


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """x / base^beta"""
    n, _, h, w = x.shape
    matrix = pixels(x)
    return images(matrix / lrn_base(matrix, size, alpha, k) ** beta, n, h, w)


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """dy / base^beta − 2·alpha·beta/size · x · Σ dy·x / base^(beta + 1), over those who have us as a neighbour."""
    n, _, h, w = x.shape
    matrix, g = pixels(x), pixels(dy)
    base = lrn_base(matrix, size, alpha, k)
    dx = g / base**beta
    through = neighbour_sums(dx * matrix / base, (size - 1) // 2, size // 2)  # the neighbourhood mirrored
    through *= matrix
    through *= 2 * alpha * beta / size
    dx -= through
    return images(dx, n, h, w)


# ---- The rest ----


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    """The label is found by comparing, not by indexing: no scatter, and nothing to wait for."""
    xp, classes, dtype = array_module(logits), logits.shape[1], logits.dtype
    log_p = logits - logits.max(axis=1, keepdims=True)  # the same softmax, and exp cannot overflow
    log_p -= xp.log(xp.exp(log_p).sum(axis=1, keepdims=True))
    is_label = xp.arange(classes) == labels[:, None]  # (N, K)
    at_label = xp.where(is_label, log_p, 0).sum(axis=1)
    losses = at_label * (smoothing - 1) - log_p.sum(axis=1) * (smoothing / classes)
    dlogits = xp.exp(log_p)
    dlogits -= smoothing / classes
    dlogits -= is_label.astype(dtype) * (1 - smoothing)
    return losses, dlogits


def concat(xs: list[Array]) -> Array:
    """The columns of the pixel matrices side by side."""
    n, _, h, w = xs[0].shape
    return images(array_module(xs[0]).concatenate([pixels(x) for x in xs], axis=1), n, h, w)


def add(a: Array, b: Array, out: Array | None) -> Array:
    """a + b, into `out` or into a fresh channels-last array."""
    xp = array_module(a)
    return xp.add(a, b, out=empty_images(xp, a.shape, a.dtype) if out is None else out)
