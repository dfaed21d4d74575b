"""What has no window: products, concatenation, sums of gradients."""

from __future__ import annotations

import numpy as np

from minigrad.kernels.loops.blas import gemm, hold, holders, let_go
from minigrad.kernels.loops.blocks import ENOUGH, LANES, chunk, rows, spread
from minigrad.kernels.loops.compiled import compiled, take
from minigrad.layout import Array, empty, empty_images


@compiled
def put(turn, x, c, y, start, step):
    """Channels start … start + c − 1 of y are those of x."""
    block = take(turn)
    while block >= 0:
        for m in range(block * step, min(block * step + step, len(x))):
            source, target = x[m], y[m, start:]
            for q in range(c):
                target[q] = source[q]
        block = take(turn)


def concat(xs: list[Array]) -> Array:
    n, _, h, w = xs[0].shape
    y, end = empty_images(np, (n, sum(x.shape[1] for x in xs), h, w), xs[0].dtype), 0
    for x in xs:
        start, end = end, end + x.shape[1]
        step = chunk(n * h * w, x.shape[1])
        spread(put, -(-n * h * w // step), rows(x), x.shape[1], rows(y), start, step)
    return y


@compiled
def plus(turn, a, b, out, c, step):
    """out = a + b."""
    block = take(turn)
    while block >= 0:
        for m in range(block * step, min(block * step + step, len(out))):
            left, right, target = a[m], b[m], out[m]
            for q in range(c):
                target[q] = left[q] + right[q]
        block = take(turn)


@compiled
def accumulate(turn, x, total, c, step):
    """total += x. In place by one name: of overlapping arrays under two LLVM makes no vector loop."""
    block = take(turn)
    while block >= 0:
        for m in range(block * step, min(block * step + step, len(total))):
            source, target = x[m], total[m]
            for q in range(c):
                target[q] += source[q]
        block = take(turn)


def add(a: Array, b: Array, out: Array | None) -> Array:
    total = empty_images(np, a.shape, a.dtype) if out is None else out
    if a.ndim != 4 or rows(total).__array_interface__["data"] != total.__array_interface__["data"]:
        return np.asarray(np.add(a, b, out=total))  # of 0-d arrays NumPy makes a scalar
    n, c = a.size // a.shape[1], a.shape[1]
    step = chunk(n, c)
    if out is None or (out is not a and out is not b):
        spread(plus, -(-n // step), rows(a), rows(b), rows(total), c, step)
    else:
        spread(accumulate, -(-n // step), rows(b if out is a else a), rows(total), c, step)
    return total


@compiled
def products(turn, holders, a, at, b, bt, out, columns):
    """out = a · b of each matrix of a stack, by blocks of columns; a and b may be a single matrix for all."""
    n, k = out.shape[2], a.shape[1] if at else a.shape[2]
    parts = -(-n // columns)
    hold(holders)
    task = take(turn)
    while task >= 0:
        s, start = task // parts, task % parts * columns
        stop, right = min(start + columns, n), b[s % len(b)]
        if bt:
            gemm(a[s % len(a)], at, right[start:stop], True, 0.0, out[s, :, start:stop], k)
        else:
            gemm(a[s % len(a)], at, right[:, start:stop], False, 0.0, out[s, :, start:stop], k)
        task = take(turn)
    let_go(holders)


def as_stack(a: Array) -> tuple[Array, bool]:
    """A matrix, or a stack of them, as a C-contiguous stack, and whether its matrices are transposed."""
    a = a[None] if a.ndim == 2 else a
    turned = not a.flags.c_contiguous and a.swapaxes(1, 2).flags.c_contiguous
    a = a.swapaxes(1, 2) if turned else a
    return (a if a.flags.c_contiguous and a.flags.writeable else a.copy("C")), turned


def matmul(a: Array, b: Array, out: Array | None) -> Array:
    (left, at), (right, bt) = as_stack(a), as_stack(b)
    m, n, stack = a.shape[-2], b.shape[-1], max(len(left), len(right))
    whole = empty(np, (stack, m, n), a.dtype)
    parts = max(1, min(LANES // stack, n // 32, stack * m * n * a.shape[-1] // ENOUGH))
    columns = -(-n // parts)
    spread(products, stack * -(-n // columns), holders, left, at, right, bt, whole, columns)
    result = whole if max(a.ndim, b.ndim) > 2 else whole[0]
    if out is None:
        return result
    out[...] = result
    return out
