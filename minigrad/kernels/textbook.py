"""The kernels as formulas on whole arrays, for NumPy and CuPy alike: the first of the modules to read.

A convolution and a pool move a window over an image. Take one cell (u, v) of the window: on the way it meets the pixels

    (i·stride + u − padding, j·stride + v − padding)    for every output pixel (i, j)

and these are a strided slice of the image with a border around it. `cells` yields the slices, one for each cell of the
window. Every windowed kernel is a line on them:

    im2col      the slices side by side: row (n, i, j) is what output pixel (i, j) of image n sees
    max pool    their maximum
    average     their sum, over the number of cells

Backward goes the other way: `gather` adds what each cell hands back to the pixels that it met. The rest is products
and sums over the pixel matrix of `minigrad.layout`, which has one row per pixel and one column per channel.

There are no blocks, no fused passes and no threads here; the other modules compute the same faster. In the comments

    N images    C channels    H×W pixels    O filters    KH×KW cells of the window    OH×OW output pixels

and `xp` is `numpy` or `cupy`. The table in `minigrad.kernels` says what every kernel takes and returns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np

from minigrad.backend import array_module
from minigrad.layout import Array, Pair, Window, channels_last, elementwise, filter_matrix, images, pixels
from minigrad.random import Key, uniform

# ---- The window ----


def borders(window: Window) -> list[Pair]:
    """How many cells to add before and after the rows, and the columns, so that every window lies inside."""
    return [
        (padding, max(padding, (output - 1) * stride + kernel - padding - size))  # ceil mode reaches beyond the padding
        for size, kernel, stride, padding, output in zip(*window, strict=True)
    ]


def bordered(x: Array, window: Window, fill: float = 0.0) -> Array:
    """Images (N, C, H, W) with a border, as a grid (N, rows, columns, C)."""
    grid = x.transpose(0, 2, 3, 1)  # (N, H, W, C)
    return array_module(x).pad(grid, ((0, 0), *borders(window), (0, 0)), constant_values=fill)


def cells(grid: Array, window: Window) -> Iterator[Array]:
    """For each cell of the window, row by row, the pixels that it meets: views (N, OH, OW, C) of a bordered grid."""
    (kh, kw), (sh, sw), (oh, ow) = window.kernel, window.stride, window.output
    for u in range(kh):
        for v in range(kw):
            yield grid[:, u : u + oh * sh : sh, v : v + ow * sw : sw]


def gather(shares: Iterable[Array], like: Array, window: Window) -> Array:
    """The transpose of `cells`: at every pixel the sum of the shares of the cells that met it.

    shares   for each cell of the window (N, OH, OW, C)
    like     an array of that shape and of the dtype
    """
    (n, _, _, c), (h, w), (top, left) = like.shape, window.input, window.padding
    grid = bordered(array_module(like).zeros((n, c, h, w), like.dtype), window)
    for cell, share in zip(cells(grid, window), shares, strict=True):
        cell += share
    return as_images(grid[:, top : top + h, left : left + w])


def as_images(grid: Array) -> Array:
    """A grid (N, H, W, C) as channels-last images (N, C, H, W)."""
    return channels_last(array_module(grid), grid.transpose(0, 3, 1, 2))


# ---- Convolution: patches times filters ----


def im2col(x: Array, window: Window) -> Array:
    """The patch matrix (N·OH·OW, KH·KW·C): in each row the cells that one output pixel sees."""
    if window.is_pointwise:
        return pixels(x)
    patches = array_module(x).stack(list(cells(bordered(x, window), window)), axis=3)  # (N, OH, OW, KH·KW, C)
    return patches.reshape(len(x) * window.output[0] * window.output[1], -1)


def col2im(patches: Array, n: int, window: Window) -> Array:
    """The transpose of `im2col`: every row of patches is added to the pixels that it was cut from."""
    if window.is_pointwise:
        return images(patches, n, *window.input)
    (oh, ow), (kh, kw) = window.output, window.kernel
    shares = patches.reshape(n, oh, ow, kh * kw, -1).transpose(3, 0, 1, 2, 4)  # (KH·KW, N, OH, OW, C)
    return gather(shares, shares[0], window)


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """y = patches @ filtersᵀ + bias"""
    patches = im2col(x, window)  # (N·OH·OW, KH·KW·C)
    y = patches @ filter_matrix(weight).T  # (N·OH·OW, O)
    if bias is not None:
        y = y + bias
    return images(y, len(x), *window.output)


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    """dpatches = dy @ filters, added up where the patches were cut out"""
    dpatches = pixels(dy) @ filter_matrix(weight)  # (N·OH·OW, KH·KW·C)
    return col2im(dpatches, len(dy), window)


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dfilters = dyᵀ @ patches, db = Σ dy"""
    dfilters = pixels(dy).T @ im2col(x, window)  # (O, KH·KW·C)
    db = column_sums(pixels(dy)) if with_bias else None  # (O,)
    return images(dfilters, dy.shape[1], *window.kernel), db


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients that are needed"""
    dx = conv2d_dx(dy, weight, window) if needs_dx else None
    dw, db = conv2d_dw(dy, x, window, with_bias) if needs_dw or with_bias else (None, None)
    return dx, dw, db


# ---- Pools: every channel on its own ----


def max_pool(x: Array, window: Window) -> Array:
    """The maximum of the cells; NaN if one of them is NaN"""
    grid = bordered(x, window, fill=-np.inf)
    return as_images(functools.reduce(array_module(x).maximum, cells(grid, window)))


def max_pool_winners(x: Array, window: Window) -> tuple[Array, list[Array]]:
    """The maximum, and the number of the first cell that has it: [(N, OH, OW, C)]"""
    xp, (n, c, _, _), (kh, kw) = array_module(x), x.shape, window.kernel
    best = xp.full((n, *window.output, c), -np.inf, x.dtype)
    first = xp.empty(best.shape, np.min_scalar_type(kh * kw))  # a byte, or two
    first[...] = first_inside(xp, window)
    for number, cell in enumerate(cells(bordered(x, window, fill=-np.inf), window)):
        first = xp.maximum(first, (cell > best) * first.dtype.type(number))  # the later one
        best = xp.maximum(best, cell)
    return as_images(best), [first]


def first_inside(xp: ModuleType, window: Window) -> Array:
    """The number of the first cell of every window that lies inside the image: (OH, OW, 1)"""
    u, v = (
        xp.maximum(padding - stride * xp.arange(output), 0)
        for stride, padding, output in zip(window.stride, window.padding, window.output, strict=True)
    )
    return (u[:, None] * window.kernel[1] + v)[:, :, None]


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    """Every output pixel's dy goes to the cell that won"""
    dy, (first,), (kh, kw) = dy.transpose(0, 2, 3, 1), winners, window.kernel  # both (N, OH, OW, C)
    return gather((dy * (first == number) for number in range(kh * kw)), dy, window)


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    """The sum of the cells, over their number"""
    total = sum(cells(bordered(x, window), window))  # (N, OH, OW, C)
    return as_images(total / cell_count(total, window, count_padding))


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    """Every cell of a window gets the same share of its dy"""
    dy, (kh, kw) = dy.transpose(0, 2, 3, 1), window.kernel  # (N, OH, OW, C)
    share = dy / cell_count(dy, window, count_padding)
    return gather(itertools.repeat(share, kh * kw), dy, window)


def cell_count(like: Array, window: Window, count_padding: bool) -> Array:
    """How many cells of every window lie inside the image, or inside the padded image: (OH, OW, 1)"""
    xp, counts = array_module(like), []
    for size, kernel, stride, padding, output in zip(*window, strict=True):
        start = stride * xp.arange(output) - padding
        low, high = (-padding, size + padding) if count_padding else (0, size)
        counts.append(xp.minimum(start + kernel, high) - xp.maximum(start, low))
    rows, columns = counts
    return (rows[:, None] * columns)[:, :, None].astype(like.dtype)


# ---- Batch norm: columns of the pixel matrix, M = N·H·W rows ----


def column_sums(rows: Array) -> Array:
    """The sum of every column, (C,): added in float64, since float32 would lose digits over many pixels."""
    return rows.sum(axis=0, dtype=np.float64).astype(rows.dtype)


def statistics(x: Array) -> tuple[Array, Array]:
    """mean = Σ x / M, var = Σ (x − mean)² / M"""
    rows = pixels(x)  # (M, C)
    mean = rows.mean(axis=0, dtype=np.float64)  # (C,)
    return mean, ((rows - mean) ** 2).mean(axis=0)


def move_running(running_mean: Array, running_var: Array, mean: Array, var: Array, n: int, momentum: float) -> None:
    """A step towards this batch's mean, and towards its unbiased variance"""
    running_mean[...] = (1 - momentum) * running_mean + momentum * mean
    running_var[...] = (1 - momentum) * running_var + momentum * var * n / (n - 1)


def normalised(x: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """x̂ = (x − mean) / σ as rows (M, C), and 1/σ (C,), where σ = √(var + eps)"""
    inverse = (1 / array_module(x).sqrt(var.astype(np.float64) + eps)).astype(x.dtype)
    return (pixels(x) - mean.astype(x.dtype)) * inverse, inverse


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """y = x̂ · gamma + beta, then max(0, y) if relu"""
    x_hat, _ = normalised(x, mean, var, eps)  # (M, C)
    y = x_hat * gamma + beta
    if relu:
        y = array_module(x).maximum(y, 0)
    return images(y, len(x), *x.shape[2:])


def batch_norm_dx(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """With dy = 0 where relu cut y off,

        dgamma = Σ dy · x̂          dbeta = Σ dy
        dx = gamma / σ · dy                                             if mean and var are constants
        dx = gamma / σ · (dy − dbeta / M − x̂ · dgamma / M)             if they are statistics of x

    To raise one x raises the mean, which lowers every y of the channel: the term dbeta / M. It also moves the variance:
    the term x̂ · dgamma / M. Ioffe and Szegedy, arXiv:1502.03167, section 3.
    """
    dy, (x_hat, inverse) = pixels(dy), normalised(x, mean, var, eps)  # (M, C), (M, C), (C,)
    if relu:
        dy = dy * (x_hat * gamma + beta > 0)
    dgamma, dbeta, m = column_sums(dy * x_hat), column_sums(dy), len(dy)  # (C,), (C,)
    if through_statistics:
        dy = dy - dbeta / m - x_hat * (dgamma / m)
    return images(gamma * inverse * dy, len(x), *x.shape[2:]), dgamma, dbeta


# ---- Convolution, batch norm and ReLU: one after the other ----


def conv_bn_relu(
    x: Array, weight: Array, window: Window, mean: Array, var: Array, gamma: Array, beta: Array, eps: float
) -> Array:
    """The convolution, then batch norm and ReLU"""
    return batch_norm(conv2d(x, weight, None, window), mean, var, gamma, beta, eps, relu=True)


def conv2d_statistics(x: Array, weight: Array, window: Window) -> tuple[Array, Array, Array]:
    """The convolution, then the statistics of its result"""
    y = conv2d(x, weight, None, window)
    return y, *statistics(y)


def conv_bn_relu_backward(
    dzs: list[Array], x: Array, weight: Array, window: Window, y: Array, mean: Array, var: Array, gamma: Array,
    beta: Array, eps: float, needs_dx: bool,
) -> tuple[Array | None, Array | None, Array, Array]:  # fmt: skip
    """Back through ReLU and batch norm, then through the convolution"""
    dy, dgamma, dbeta = batch_norm_dx(concat(dzs), y, mean, var, gamma, beta, eps, True, True)
    dx, dw, _ = conv2d_backward(dy, x, weight, window, needs_dx, True, False)
    return dx, dw, dgamma, dbeta


# ---- Local response normalisation: rows of the pixel matrix ----


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """y = x / d^beta, with d from `lrn_divisor`. Krizhevsky et al., NIPS 2012, section 3.3, alpha / size being its α"""
    rows = pixels(x)  # (N·H·W, C)
    return images(rows / lrn_divisor(rows, size, alpha, k) ** beta, len(x), *x.shape[2:])


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """dx[c] = dy[c] / d[c]^beta − 2 · alpha · beta / size · x[c] · Σ_b dy[b] · x[b] / d[b]^(beta + 1)

    where b runs over the channels that have c as a neighbour
    """
    rows, dy = pixels(x), pixels(dy)  # (N·H·W, C)
    d = lrn_divisor(rows, size, alpha, k)
    through = neighbours(dy * rows / d ** (beta + 1), (size - 1) // 2, size // 2)
    return images(dy / d**beta - 2 * alpha * beta / size * rows * through, len(x), *x.shape[2:])


def lrn_divisor(rows: Array, size: int, alpha: float, k: float) -> Array:
    """d[c] = k + alpha / size · Σ x²  over `size` channels around c; of an even size the extra one is below c"""
    return k + alpha / size * neighbours(rows**2, size // 2, (size - 1) // 2)


def neighbours(rows: Array, below: int, above: int) -> Array:
    """In every column the sum of columns c − below … c + above, as far as there are any"""
    c = rows.shape[1]
    padded = array_module(rows).pad(rows, ((0, 0), (below, above)))
    return sum(padded[:, i : i + c] for i in range(below + 1 + above))


# ---- The rest ----


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    """losses = −Σ target · log p and dlogits = p − target, where p = softmax(logits)

    target is 1 − smoothing at the label, plus smoothing / K everywhere (arXiv:1512.00567, section 7)
    """
    xp, k = array_module(logits), logits.shape[1]
    shifted = logits - logits.max(axis=1, keepdims=True)  # (N, K): the same softmax, and exp cannot overflow
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    is_label = labels[:, None] == xp.arange(k)  # (N, K)
    target = ((1 - smoothing) * is_label + smoothing / k).astype(logits.dtype)
    losses = -(target * xp.where(target == 0, 0, log_p)).sum(axis=1)  # 0 · −∞ counts as 0
    return losses, xp.exp(log_p) - target


def dropout(x: Array, p: float, key: Key, rows: Array | None) -> Array:
    """x / (1 − p) where the element's random number is at least p, else 0"""
    xp = array_module(x)
    kept = uniform(key, x.shape, rows=rows, xp=xp) >= p
    return channels_last(xp, xp.where(kept, x / (1 - p), 0))


def matmul(a: Array, b: Array, out: Array | None) -> Array:
    """a @ b"""
    return array_module(a).matmul(a, b, out=out)


def concat(xs: list[Array]) -> Array:
    """The columns of the pixel matrices side by side"""
    n, _, h, w = xs[0].shape
    columns = array_module(xs[0]).concatenate([pixels(x) for x in xs], axis=1)  # (N·H·W, ΣC)
    return images(columns, n, h, w)


def add(a: Array, b: Array, out: Array | None) -> Array:
    """a + b"""
    xp = array_module(a)
    return xp.asarray(elementwise(xp.add, a, b)) if out is None else xp.add(a, b, out=out)


# ---- Pictures on a GPU: not in the table, since the host changes one picture at a time ----


def augment(pictures: Array, changes: Array, side: int, table: Array) -> Array:
    """Pictures cropped, mirrored, with a square cut out, and normalised: see cuda/pictures.py for the arguments"""
    xp, (_, h, w, _) = array_module(table), pictures.shape
    number, down, right, mirrored, top, left = changes.T[:, :, None, None]  # (N, 1, 1) each
    i, j = xp.arange(h)[:, None], xp.arange(w)  # (H, 1), (W,)
    y, x = i + down, xp.where(mirrored, w - 1 - j, j) + right  # (N, H, 1), (N, 1, W): where pixel (i, j) comes from
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)  # (N, H, W)
    square = (i >= top) & (i < top + side) & (j >= left) & (j < left + side)
    levels = pictures[number, y.clip(0, h - 1), x.clip(0, w - 1)] * inside[..., None]  # (N, H, W, C); outside black
    levels = xp.where(square[..., None], 256, levels.astype(np.int64))
    return as_images(table[levels, xp.arange(levels.shape[3])])
