"""Convolution: im2col and a matrix product, block by block, each block as far as it goes while it is in the cache.

Forward is `convolve`, or `winograd` where that pays: 3×3 and 5×5 at stride 1. Backward goes one of three ways:

    both_gradients    stride 1: patches of dy, which give dx and dw at once
    filter_gradient, input_gradient    other strides, or if only one is wanted: by the book, dw = dyᵀ · patches of x and
                      dx = col2im(dy · filters)
    winograd          as forward

dy may be given as the gradient behind a batch norm and ReLU: then `upstream` computes it, block by block, where it is
read.
"""

from __future__ import annotations

import numpy as np

from minigrad.kernels.loops import norm as norms
from minigrad.kernels.loops import winograd
from minigrad.kernels.loops.blocks import ENOUGH, LANES, block_rows, flat, matrix, rows, spread
from minigrad.kernels.loops.compiled import VECTOR, compiled, copy_run, take
from minigrad.kernels.loops.norm import (
    add_lanes,
    apply,
    gradient_of,
    joined,
    merged,
    moments,
    none,
    room_for_moments,
    scale_and_shift,
    through_batch_norm,
    upstream,
)
from minigrad.kernels.loops.product import packed, padded, product, product_of_transposed
from minigrad.layout import Array, Window, empty, empty_images

SLACK = VECTOR // 4  # values behind an array that `copy_run` may read or overwrite

# --- patches


@compiled
def im2col(x, c, window, first, last, skipped):
    """What the pixels of output rows first … last − 1 see, KH·KW·C values each; x begins with input row `skipped`."""
    h, w, kh, kw, sh, sw, ph, pw, oh, ow = window
    wide, run = (w + 2 * pw + sw) * c, kw * c  # of a padded row of the image, and of what a pixel sees of it
    pixels, k = (last - first) * ow, kh * run
    patches = np.empty(pixels * k + SLACK, x.dtype)
    band = np.zeros(kh * wide + SLACK, x.dtype)
    for r in range(first, last):
        i, top = r // oh, r % oh * sh - ph
        for u in range(kh):
            row = band[u * wide + pw * c : u * wide + (pw + w) * c]
            if 0 <= top + u < h:
                copy_row(x[(i * h + top + u - skipped) * w :], w, c, row)
            else:
                row[:] = 0
        for b in range(ow):
            for u in range(kh):
                copy_run(band, u * wide + b * sw * c, patches, ((r - first) * ow + b) * k + u * run, run)
    return patches[: pixels * k].reshape(pixels, k)


@compiled
def copy_row(x, w, c, row):
    """w pixels of c channels each, side by side."""
    if x.shape[1] == c:
        source = x.reshape(-1)
        for q in range(w * c):
            row[q] = source[q]
        return
    for v in range(w):
        source, target = x[v], row[v * c :]
        for q in range(c):
            target[q] = source[q]


@compiled
def is_pointwise(window):
    """1×1, stride 1, no padding: the patches are the pixels."""
    _, _, kh, kw, sh, sw, ph, pw, _, _ = window
    return kh * kw * sh * sw == 1 and ph + pw == 0


# --- forward


@compiled
def convolve(turn, x, c, filters, o, norm, relu, y, counts, means, squares, window, step, columns):
    """y = patches · filters; then scale and shift and ReLU, or the moments of each block."""
    ow, k = window[9], window[2] * window[3] * c
    total, parts = len(y) // ow, -(-o // columns)
    task = take(turn)
    while task >= 0:
        block, start = task // parts, task % parts * columns
        first, last, stop = block * step, min(block * step + step, total), min(start + columns, o)
        source = x[first * ow : last * ow] if is_pointwise(window) else im2col(x, c, window, first, last, 0)
        out = y[first * ow : last * ow, start:stop]
        product(source, filters[start * k :], out, k)
        if len(norm):
            apply(out, norm[:, start:stop], relu)
        if len(means):
            moments(out, means[block, start:stop], squares[block, start:stop])
            counts[block] = len(out)
        task = take(turn)


def convolved(x: Array, weight: Array, norm: Array, relu: bool, window: Window, statistics: bool = False):
    """The convolution, by the way that its sizes favour; norm (2, O): scale and shift, or nothing."""
    if winograd.pays(x.shape, len(weight), window):
        return winograd.convolved(x, weight, norm, relu, window, statistics)
    n, c, o, (oh, ow), size = len(x), x.shape[1], len(weight), window.output, x.itemsize
    filters = matrix(weight.transpose(0, 2, 3, 1)).reshape(o, -1)
    k = filters.shape[1]
    y = empty_images(np, (n, o, oh, ow), x.dtype)
    step = block_rows(n * oh, ow, (k + o) * size, k * o)
    blocks = -(-n * oh // step)
    parts = max(1, min(LANES // blocks, o // 32, n * oh * ow * k * o // ENOUGH // blocks))
    counts, (means, squares) = room_for_moments(blocks if statistics else 0, o)
    columns = padded(-(-o // parts), size)
    spread(convolve, blocks * -(-o // columns), rows(x), c, packed(filters, True, columns), o, norm, relu, rows(y),
           counts, means, squares, flat(window), step, columns)  # fmt: skip
    return (y, *merged(means, squares, counts)) if statistics else y


def conv2d(x: Array, weight: Array, bias: Array | None, window: Window) -> Array:
    """y = x ⋆ weight + bias"""
    norm = none(x.dtype) if bias is None else np.stack((np.ones_like(bias), bias))
    return convolved(x, weight, norm, False, window)


def conv2d_statistics(x: Array, weight: Array, window: Window) -> tuple[Array, Array, Array]:
    """The moments of each block while it is in the cache"""
    return convolved(x, weight, none(x.dtype), False, window, statistics=True)


def conv_bn_relu(
    x: Array, weight: Array, window: Window, mean: Array, var: Array, gamma: Array, beta: Array, eps: float
) -> Array:
    """Scale, shift and max(0, ·) of each block while it is in the cache"""
    return convolved(x, weight, scale_and_shift(mean, var, gamma, beta, eps), True, window)


# --- backward


@compiled
def both_gradients(turn, dz, o, y, norm, x, c, turned, dx, dws, mirror, step, columns):
    """Patches of dy, around every pixel of x: times the turned filters they are dx; their transpose times x is dw.

    dy meets x[h] through the cell u of the filter where it meets x[h + 1] through u + 1. So the pixels of dy that x[h]
    had a part in are again a window, around h, and the cell of the filter runs backwards in it.
    """
    oh, ow, kh, _, _, _, ph, _, h, w = mirror
    total, k, lanes, parts = len(dx) // w, dws.shape[1], len(dws), -(-c // columns)
    task = take(turn)
    while task >= 0:
        lane, start, stop = task // parts, task % parts * columns, min(task % parts * columns + columns, c)
        for block in range(lane, -(-total // step), lanes):
            first, last = block * step, min(block * step + step, total)
            begin = first // h * oh + max(0, first % h - ph)  # the rows of dy that are seen
            end = (last - 1) // h * oh + min(oh, (last - 1) % h - ph + kh)
            dy = upstream(dz, o, y, norm, begin * ow, end * ow)
            patches = dy if is_pointwise(mirror) else im2col(dy, o, mirror, first, last, begin)
            own = x[first * w : last * w, start:stop]
            product(patches, turned[start * k :], dx[first * w : last * w, start:stop], k)
            product_of_transposed(patches, own, dws[lane, :, start:stop], block != lane)
        task = take(turn)


@compiled
def filter_gradient(turn, dz, o, y, norm, x, c, dws, window, step):
    """dw = dyᵀ · patches of x."""
    ow = window[9]
    total, lanes = len(dz) // ow, len(dws)
    lane = take(turn)
    while lane >= 0:
        for block in range(lane, -(-total // step), lanes):
            first, last = block * step, min(block * step + step, total)
            dy = upstream(dz, o, y, norm, first * ow, last * ow)
            patches = x[first * ow : last * ow] if is_pointwise(window) else im2col(x, c, window, first, last, 0)
            product_of_transposed(dy, patches, dws[lane], block != lane)
        lane = take(turn)


@compiled
def input_gradient(turn, dy, o, filters, c, dx, window, step):
    """dx of each image: the pixels of dy times the filters (O, KH·KW·C), added up where their windows were."""
    h, w, kh, kw, sh, sw, ph, pw, oh, ow = window
    i = take(turn)
    while i >= 0:
        dx[i * h * w : (i + 1) * h * w] = 0
        for top in range(0, oh, step):
            first, last = i * oh + top, i * oh + min(top + step, oh)
            patches = np.empty(((last - first) * ow, kh * kw * c), dy.dtype)
            product(dy[first * ow : last * ow], filters, patches, o)
            for m in range(len(patches)):
                a, b = (top + m // ow) * sh - ph, m % ow * sw - pw
                for u in range(max(0, -a), min(kh, h - a)):
                    for v in range(max(0, -b), min(kw, w - b)):
                        target, source = dx[(i * h + a + u) * w + b + v], patches[m, (u * kw + v) * c :]
                        for q in range(c):
                            target[q] += source[q]
        i = take(turn)


@compiled
def turn_filters(turn, filters, scale, step, turned):
    """(O, KH·KW, C) turned by 180°, times a number for each, inputs and outputs exchanged: (KH·KW·O, C)."""
    o, k, c = filters.shape
    block = take(turn)
    while block >= 0:
        for f in range(block * step, min(block * step + step, o)):
            for t in range(k):
                source, target = filters[f, t], turned[(k - 1 - t) * o + f]
                for q in range(c):
                    target[q] = source[q] * scale[f]
        block = take(turn)


@compiled
def turn_back(turn, dws, scale, step, dw):
    """The sum over lanes of gradients (KH·KW·O, C) of turned filters, times a number for each: (O, KH·KW, C) again."""
    o, k = dw.shape[:2]
    block = take(turn)
    while block >= 0:
        for f in range(block * step, min(block * step + step, o)):
            for t in range(k):
                add_lanes(dws[:, (k - 1 - t) * o + f], scale[f], dw[f, t])
        block = take(turn)


def turned_filters(weight: Array, scale: Array) -> Array:
    o, c, kh, kw = weight.shape
    turned = empty(np, (kh * kw * o, c), weight.dtype)
    step = -(-o // min(LANES, max(1, weight.size >> 16)))
    spread(turn_filters, -(-o // step), matrix(weight.transpose(0, 2, 3, 1)).reshape(o, -1, c), scale, step, turned)
    return turned


def gradients(
    dz: Array, y: Array, norm: Array, scale: Array, x: Array, weight: Array, window: Window, needs_dx: bool
) -> tuple[Array | None, Array]:
    """dx, dw of a convolution at stride 1, padded by less than half of its kernel; or dw alone, of any."""
    (o, c, kh, kw), (ph, pw), n, size = weight.shape, window.padding, len(x), x.itemsize
    if needs_dx and winograd.pays(x.shape, o, window):
        return winograd.gradients(dz, y, norm, scale, x, weight, window)
    dw, dzs, ys, xs = np.empty((o, kh, kw, c), x.dtype), rows(dz), rows(y), rows(x)
    if not needs_dx:
        k, (oh, ow) = kh * kw * c, window.output
        step = block_rows(n * oh, ow, (k + o) * size, k * o)
        dws = empty(np, (min(LANES, -(-n * oh // step)), o, k), x.dtype)
        spread(filter_gradient, len(dws), dzs, o, ys, norm, xs, c, dws, flat(window), step)
        np.multiply(dws.sum(0).reshape(dw.shape), scale[:, None, None, None], out=dw)
        return None, dw.transpose(0, 3, 1, 2)
    k, (h, w) = kh * kw * o, window.input
    mirror = Window.of(window.output, (kh, kw), 1, (kh - 1 - ph, kw - 1 - pw))
    dx, turned = empty_images(np, x.shape, x.dtype), turned_filters(weight, scale)
    step = block_rows(n * h, w, (k + c) * size, 2 * k * c)
    lanes = min(LANES, -(-n * h // step))
    columns = padded(-(-c // max(1, min(LANES // lanes, c // 32, 2 * n * h * w * k * c // ENOUGH // lanes))), size)
    dws = empty(np, (lanes, k, c), x.dtype)
    spread(both_gradients, lanes * -(-c // columns), dzs, o, ys, norm, xs, c, packed(turned, False, columns), rows(dx),
           dws, flat(mirror), step, columns)  # fmt: skip
    step = -(-o // min(LANES, max(1, dws.size >> 16)))
    spread(turn_back, -(-o // step), dws, scale, step, dw.reshape(o, kh * kw, c))
    return dx, dw.transpose(0, 3, 1, 2)


def small_padding(window: Window) -> bool:
    """dy is no larger than x, and the stride is 1: its patches give dx."""
    return window.stride == (1, 1) and all(2 * p < k for p, k in zip(window.padding, window.kernel, strict=True))


def conv2d_dx(dy: Array, weight: Array, window: Window) -> Array:
    """At stride 1 a convolution of dy with the turned filters, else col2im(dy · filters)"""
    (o, c, kh, kw), (ph, pw) = weight.shape, window.padding
    if window.stride == (1, 1) and ph < kh and pw < kw:
        mirror = Window.of(window.output, window.kernel, 1, (kh - 1 - ph, kw - 1 - pw))
        return convolved(dy, weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3), none(dy.dtype), False, mirror)
    dx = empty_images(np, (len(dy), c, *window.input), dy.dtype)
    filters = matrix(weight.transpose(0, 2, 3, 1)).reshape(o, -1)
    step = block_rows(window.output[0], window.output[1], filters.shape[1] * dy.itemsize, 1)
    spread(input_gradient, len(dy), rows(dy), o, packed(filters), c, rows(dx), flat(window), step)
    return dx


def conv2d_dw(dy: Array, x: Array, window: Window, with_bias: bool) -> tuple[Array, Array | None]:
    """dyᵀ · patches of x"""
    scale, like = np.ones(dy.shape[1], x.dtype), np.empty((dy.shape[1], x.shape[1], *window.kernel), x.dtype)
    _, dw = gradients(dy, dy, none(x.dtype), scale, x, like, window, False)
    return dw, sum_of_pixels(dy) if with_bias else None


def sum_of_pixels(dy: Array) -> Array:
    """(O,)"""
    return (norms.statistics(dy)[0] * (dy.size // dy.shape[1])).astype(dy.dtype)


def conv2d_backward(
    dy: Array, x: Array, weight: Array, window: Window, needs_dx: bool, needs_dw: bool, with_bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """The way that the sizes favour"""
    if needs_dx and needs_dw and small_padding(window):
        scale = np.ones(len(weight), x.dtype)
        dx, dw = gradients(dy, dy, none(x.dtype), scale, x, weight, window, True)
        return dx, dw, sum_of_pixels(dy) if with_bias else None
    dx = conv2d_dx(dy, weight, window) if needs_dx else None
    return dx, *(conv2d_dw(dy, x, window, with_bias) if needs_dw or with_bias else (None, None))


def conv_bn_relu_backward(
    dzs: list[Array], x: Array, weight: Array, window: Window, y: Array, mean: Array, var: Array, gamma: Array,
    beta: Array, eps: float, needs_dx: bool,
) -> tuple[Array | None, Array | None, Array, Array]:  # fmt: skip
    """One pass over dz and y for the sums; a second where the convolution's backward reads its gradient from them"""
    dz = joined(dzs)
    norm, scale, dgamma, dbeta = through_batch_norm(dz, y, mean, var, gamma, beta, eps, True, True)
    if needs_dx and not small_padding(window):
        dy = gradient_of(dz, y, norm, scale)
        return *conv2d_backward(dy, x, weight, window, True, True, False)[:2], dgamma, dbeta
    return *gradients(dz, y, norm, scale, x, weight, window, needs_dx), dgamma, dbeta
