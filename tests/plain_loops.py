"""The kernel table as plain loops, slow and independent of the package's kernels: the oracle that tests hold them to.

Every function here is its formula with the sums written as `for`. Index names are those of the formulas:

    n           image                               o           output channel (filter)
    i, j        row and column of the output        c           input channel
    u, v        row and column in the window        h, w        row and column of the input: h = i·stride + u − padding

All arithmetic is in float64; the result is rounded to the input's dtype once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minigrad.layout import Array, Window, channels_last
from minigrad.random import Key, uniform

Cell = tuple[int, int, int, int]


def stops(window: Window) -> Iterator[tuple[int, int]]:
    """Every output pixel (i, j), row by row."""
    for i in range(window.output[0]):
        for j in range(window.output[1]):
            yield i, j


def cells(window: Window, i: int, j: int) -> Iterator[Cell]:
    """The cells (u, v, h, w) that output pixel (i, j) sees inside the image, row by row; the rest is padding."""
    for u in range(window.kernel[0]):
        for v in range(window.kernel[1]):
            h = i * window.stride[0] + u - window.padding[0]
            w = j * window.stride[1] + v - window.padding[1]
            if 0 <= h < window.input[0] and 0 <= w < window.input[1]:
                yield u, v, h, w


def double(*arrays: Array) -> tuple[Array, ...]:
    """Float64 copies, so that nothing below can touch an input."""
    return tuple(np.array(a, dtype=np.float64) for a in arrays)


def rounded(y: Array, like: Array) -> Array:
    """The result y in the dtype of the input `like`, channels-last."""
    return channels_last(np, y.astype(like.dtype))


# Convolution: one product per (n, o, c, window cell), gathered three ways. The sum over c is the vector operation.


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """y[n, o, i, j] = bias[o] + Σ_c Σ_u Σ_v x[n, c, h, w] · weight[o, c, u, v]"""
    x64, weight64 = double(x, weight)
    y = np.zeros((len(x), len(weight), *window.output))
    for n in range(len(x)):
        for o in range(len(weight)):
            for i, j in stops(window):
                for u, v, h, w in cells(window, i, j):
                    y[n, o, i, j] += x64[n, :, h, w] @ weight64[o, :, u, v]
                if bias is not None:
                    y[n, o, i, j] += bias[o]
    return rounded(y, x)


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    """dx[n, c, h, w] = Σ_o Σ over the windows (i, j) that see (h, w) at (u, v): dy[n, o, i, j] · weight[o, c, u, v]"""
    dy64, weight64 = double(dy, weight)
    dx = np.zeros((len(dy), weight.shape[1], *window.input))
    for n in range(len(dy)):
        for o in range(len(weight)):
            for i, j in stops(window):
                for u, v, h, w in cells(window, i, j):
                    dx[n, :, h, w] += dy64[n, o, i, j] * weight64[o, :, u, v]
    return rounded(dx, dy)


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dw[o, c, u, v] = Σ_n Σ_i Σ_j dy[n, o, i, j] · x[n, c, h, w],   db[o] = Σ_n Σ_i Σ_j dy[n, o, i, j]"""
    dy64, x64 = double(dy, x)
    dw = np.zeros((dy.shape[1], x.shape[1], *window.kernel))
    db = np.zeros(dy.shape[1])
    for n in range(len(dy)):
        for o in range(dy.shape[1]):
            for i, j in stops(window):
                for u, v, h, w in cells(window, i, j):
                    dw[o, :, u, v] += dy64[n, o, i, j] * x64[n, :, h, w]
                db[o] += dy64[n, o, i, j]
    return rounded(dw, x), rounded(db, x) if with_bias else None


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients that are needed."""
    dx = conv2d_dx(dy, weight, window) if needs_dx else None
    return dx, *(conv2d_dw(dy, x, window, with_bias) if needs_dw or with_bias else (None, None))


# Pooling: every image n and channel c on its own.


def max_pool(x: Array, window: Window) -> Array:
    """y[n, c, i, j] = max over the window's cells inside the image of x[n, c, h, w]; NaN if one of them is NaN.

    Padding is −∞: it never wins against a cell, however negative.
    """
    y = np.full((*x.shape[:2], *window.output), -np.inf)
    for i, j in stops(window):
        for _, _, h, w in cells(window, i, j):
            y[:, :, i, j] = np.maximum(y[:, :, i, j], x[:, :, h, w])
    return rounded(y, x)


def max_pool_winners(x: Array, window: Window) -> tuple[Array, list[Array]]:
    """The maximum, and which cell has it, in two steps:

        across[n, c, h, j] = the first v with x[n, c, h, w] = the maximum of that row of the kernel
        down[n, c, i, j]   = the first u with that row's maximum = y[n, c, i, j]

    Together they are the window's first maximum, row by row. Ties are the normal case after ReLU, where whole windows
    are zero.
    """
    y, kh, channels = max_pool(x, window), window.kernel[0], x.shape[:2]
    across, down = np.zeros((*channels, window.input[0], window.output[1]), np.int8), np.zeros(y.shape, np.int8)
    for n, c in np.ndindex(channels):
        for i, j in stops(window):
            first = np.full(kh, -np.inf), np.full(kh, -1)  # each row's maximum, and its v
            for u, v, h, w in cells(window, i, j):
                if first[1][u] < 0 or x[n, c, h, w] > first[0][u]:
                    first[0][u], first[1][u] = x[n, c, h, w], v
                across[n, c, h, j] = first[1][u]
            inside = [u for u in range(kh) if first[1][u] >= 0]
            down[n, c, i, j] = max(inside, key=lambda u: first[0][u])  # the first of several
    return y, [channels_last(np, across), channels_last(np, down)]


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    """dx[n, c, h, w] = Σ of dy[n, c, i, j] over the windows whose winner is (h, w)"""
    (dy64,), (across, down) = double(dy), winners
    dx = np.zeros((*dy.shape[:2], *window.input))
    for n, c in np.ndindex(dy.shape[:2]):
        for i, j in stops(window):
            h = i * window.stride[0] + down[n, c, i, j] - window.padding[0]
            w = j * window.stride[1] + across[n, c, h, j] - window.padding[1]
            dx[n, c, h, w] += dy64[n, c, i, j]
    return rounded(dx, dy)


def divisor(window: Window, i: int, j: int, count_padding: bool) -> int:
    """What the sum over window (i, j) is divided by: its cells inside the image, or inside the padded image.

    Only ceil mode makes windows that reach beyond the padded image.
    """
    if not count_padding:
        return sum(1 for _ in cells(window, i, j))
    rows = min(window.kernel[0], window.input[0] + 2 * window.padding[0] - i * window.stride[0])
    columns = min(window.kernel[1], window.input[1] + 2 * window.padding[1] - j * window.stride[1])
    return rows * columns


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    """y[n, c, i, j] = Σ over the window's cells inside the image of x[n, c, h, w] / divisor(i, j)"""
    (x64,) = double(x)
    y = np.zeros((*x.shape[:2], *window.output))
    for i, j in stops(window):
        for _, _, h, w in cells(window, i, j):
            y[:, :, i, j] += x64[:, :, h, w] / divisor(window, i, j, count_padding)
    return rounded(y, x)


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    """dx[n, c, h, w] = Σ over the windows (i, j) that see (h, w) of dy[n, c, i, j] / divisor(i, j)"""
    (dy64,) = double(dy)
    dx = np.zeros((*dy.shape[:2], *window.input))
    for i, j in stops(window):
        for _, _, h, w in cells(window, i, j):
            dx[:, :, h, w] += dy64[:, :, i, j] / divisor(window, i, j, count_padding)
    return rounded(dx, dy)


# Batch norm: every channel c on its own; sums and means run over the pixels (n, h, w), m of them.


def statistics(x: Array) -> tuple[Array, Array]:
    """mean[c] = Σ x[n, c, h, w] / m,   var[c] = Σ (x[n, c, h, w] − mean[c])² / m,   both float64"""
    (x64,) = double(x)
    mean, var = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for c in range(x.shape[1]):
        mean[c] = np.mean(x64[:, c])
        var[c] = np.mean((x64[:, c] - mean[c]) ** 2)
    return mean, var


def move_running(running_mean: Array, running_var: Array, mean: Array, var: Array, n: int, momentum: float) -> None:
    """running_mean[c] ← (1 − momentum)·running_mean[c] + momentum·mean[c],   the same with var[c]·n / (n − 1)"""
    for c in range(len(mean)):
        running_mean[c] = (1 - momentum) * float(running_mean[c]) + momentum * float(mean[c])
        running_var[c] = (1 - momentum) * float(running_var[c]) + momentum * float(var[c]) * n / (n - 1)


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """y[n, c, h, w] = (x[n, c, h, w] − mean[c]) / √(var[c] + eps) · gamma[c] + beta[c],   then max(0, y) if relu"""
    x64, mean, var, gamma, beta = double(x, mean, var, gamma, beta)
    y = np.zeros(x.shape)
    for c in range(x.shape[1]):
        y[:, c] = (x64[:, c] - mean[c]) / np.sqrt(var[c] + eps) * gamma[c] + beta[c]
    return rounded(np.maximum(y, 0) if relu else y, x)


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
    """With x̂ = (x − mean) / √(var + eps), and dy set to 0 where relu cut y off,

        dgamma = Σ dy · x̂          dbeta = Σ dy
        dx = gamma / √(var + eps) · dy                                            if mean and var are constants
        dx = gamma / √(var + eps) · (dy − dbeta / m − x̂ · dgamma / m)            if they are statistics of x

    Raising one x raises the mean, which lowers every y of its channel: the term dbeta / m; it moves the variance
    too: the term x̂ · dgamma / m. Ioffe and Szegedy, arXiv:1502.03167, section 3.
    """
    dy64, x64, mean, var, gamma, beta = double(dy, x, mean, var, gamma, beta)
    dx, dgamma, dbeta = np.zeros(x.shape), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for c in range(x.shape[1]):
        std = np.sqrt(var[c] + eps)
        x_hat = (x64[:, c] - mean[c]) / std
        g = dy64[:, c]
        if relu:
            g = np.where(x_hat * gamma[c] + beta[c] > 0, g, 0)
        dgamma[c] = np.sum(g * x_hat)
        dbeta[c] = np.sum(g)
        if through_statistics:
            g = g - dbeta[c] / g.size - x_hat * dgamma[c] / g.size
        dx[:, c] = gamma[c] / std * g
    return rounded(dx, x), rounded(dgamma, x), rounded(dbeta, x)


# Convolution, batch norm and ReLU together: nothing but one after the other.


def conv_bn_relu(
    x: Array, weight: Array, window: Window, mean: Array, var: Array, gamma: Array, beta: Array, eps: float
) -> Array:
    """The convolution, then batch norm and ReLU"""
    return batch_norm(conv2d(x, weight, None, window), mean, var, gamma, beta, eps, True)


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


# Local response normalisation: every pixel on its own, across channels.


def neighbours(c: int, size: int, channels: int) -> range:
    """The `size` channels around c, clipped at the ends; an even size has its extra channel below c."""
    return range(max(0, c - size // 2), min(channels, c + (size - 1) // 2 + 1))


def lrn_base(x: Array, size: int, alpha: float, k: float) -> Array:
    """d[n, c, h, w] = k + alpha / size · Σ over the neighbours b of c of x[n, b, h, w]²"""
    d = np.full(x.shape, float(k))
    for c in range(x.shape[1]):
        for b in neighbours(c, size, x.shape[1]):
            d[:, c] += alpha / size * x[:, b] ** 2
    return d


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """y = x / d^beta, d from `lrn_base`. Krizhevsky et al., NIPS 2012, section 3.3, with alpha / size for its α."""
    (x64,) = double(x)
    return rounded(x64 / lrn_base(x64, size, alpha, k) ** beta, x)


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """dx[c] = dy[c] / d[c]^beta − 2 · alpha · beta / size · x[c] · Σ_b dy[b] · x[b] / d[b]^(beta + 1)

    at every pixel; b runs over the channels that have c as a neighbour.
    """
    dy64, x64 = double(dy, x)
    d = lrn_base(x64, size, alpha, k)
    dx = dy64 / d**beta
    for b in range(x.shape[1]):
        for c in neighbours(b, size, x.shape[1]):
            dx[:, c] -= 2 * alpha * beta / size * x64[:, c] * dy64[:, b] * x64[:, b] / d[:, b] ** (beta + 1)
    return rounded(dx, x)


# The rest.


def cross_entropy(logits: Array, labels: Array, smoothing: float) -> tuple[Array, Array]:
    """losses[n] = −Σ_c target[c] · log p[c],   dlogits[n, c] = p[c] − target[c],   p = softmax(logits[n])

    target is 1 − smoothing at the label, plus smoothing / K everywhere (arXiv:1512.00567, section 7).
    """
    (logits64,) = double(logits)
    losses, dlogits = np.zeros(len(logits)), np.zeros(logits.shape)
    for n, label in enumerate(labels):
        target = np.full(logits.shape[1], smoothing / logits.shape[1])
        target[label] += 1 - smoothing
        shifted = logits64[n] - np.max(logits64[n])  # the same softmax, and exp cannot overflow
        log_p = shifted - np.log(np.sum(np.exp(shifted)))
        losses[n] = -np.sum(target[target != 0] * log_p[target != 0])  # 0 · −∞ counts as 0
        dlogits[n] = np.exp(log_p) - target
    return rounded(losses, logits), rounded(dlogits, logits)


def concat(xs: list[Array]) -> Array:
    """The channels of xs[0], then those of xs[1], …"""
    return channels_last(np, np.concatenate(xs, axis=1))


def matmul(a: Array, b: Array, out: Array | None) -> Array:
    """out[…, i, j] = Σ_k a[…, i, k] · b[…, k, j]"""
    a64, b64 = double(a, b)
    y = np.zeros((*max(a.shape[:-2], b.shape[:-2], key=len), a.shape[-2], b.shape[-1]))
    for k in range(a.shape[-1]):
        y += a64[..., :, k, None] * b64[..., None, k, :]
    if out is None:
        return y.astype(a.dtype)
    out[...] = y
    return out


def add(a: Array, b: Array, out: Array | None) -> Array:
    """a + b, written into `out` unless it is None."""
    if out is None:
        return channels_last(np, np.asarray(a + b))
    out[...] = a + b
    return out


def dropout(x: Array, p: float, key: Key, rows: Array | None) -> Array:
    """y[i] = x[i] / (1 − p) if u[i] ≥ p else 0,   u[i] the random number of element i in the order of the axes"""
    (x64,) = double(x)
    y, u = np.zeros(x.shape), uniform(key, x.shape, rows=rows)
    for i in np.ndindex(x.shape):
        if u[i] >= p:
            y[i] = x64[i] / (1 - p)
    return rounded(y, x)
