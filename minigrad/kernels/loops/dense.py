"""What has no window: products, concatenation, sums of gradients."""

from __future__ import annotations

import numpy as np

from minigrad.kernels.loops.blocks import ENOUGH, LANES, chunk, matrix, rows, spread
from minigrad.kernels.loops.compiled import compiled, take
from minigrad.kernels.loops.product import PIECE, packed, padded, product, product_of_transposed
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
def products(turn, a, b, panels, out, step, columns):
    """out[s] = a[s] · b by the panels of b; or aᵀ[s] · b[s] where there are none. One matrix may serve all s.

    A block is `step` rows by `columns` columns of a product.
    """
    m, n = out.shape[1:]
    down, across = -(-m // step), -(-n // columns)
    block = take(turn)
    while block >= 0:
        s, first, start = block // (down * across), block // across % down * step, block % across * columns
        last, stop, left = min(first + step, m), min(start + columns, n), a[s % len(a)]
        target = out[s, first:last, start:stop]
        if len(panels):
            k = left.shape[1]
            product(left[first:last], panels[start * k :], target, k)
        else:
            product_of_transposed(left[:, first:last], b[s % len(b)][:, start:stop], target, False)
        block = take(turn)


def as_stack(a: Array, transposed: bool = False) -> Array:
    """A matrix or a stack of them, or their transposes, as a C-contiguous stack."""
    a = a if a.ndim == 3 else a[None]
    return matrix(a.swapaxes(1, 2) if transposed else a)


def matmul(a: Array, b: Array, out: Array | None) -> Array:
    (m, k), n = a.shape[-2:], b.shape[-1]
    if a.ndim == b.ndim == 2 and m < n and b.T.flags.c_contiguous and not b.flags.c_contiguous:
        result = np.ascontiguousarray(matmul(b.T, a.T, None).T)  # reads b once, as it lies: a·b = (bᵀ·aᵀ)ᵀ
    else:
        result = _matmul(a, b, m, k, n)
    if out is None:
        return result
    out[...] = result
    return out


def _matmul(a: Array, b: Array, m: int, k: int, n: int) -> Array:
    stack = max(len(x) if x.ndim == 3 else 1 for x in (a, b))
    whole = empty(np, (stack, m, n), a.dtype)
    parts = max(1, min(-(-LANES // stack), stack * m * n * k // ENOUGH))
    across = 1 if m >= n else min(parts, -(-n // 32))
    columns, step = padded(-(-n // across), a.itemsize), -(-m // min(parts // across, m))
    if b.ndim == 3 or (b.flags.c_contiguous and (m < PIECE or not a.flags.c_contiguous)):
        args: tuple[Array, ...] = as_stack(a, transposed=True), as_stack(b), np.empty(0, a.dtype)
    else:
        turned = not b.flags.c_contiguous
        args = as_stack(a), whole, packed(matrix(b.T if turned else b), turned, columns)
    spread(products, stack * -(-m // step) * -(-n // columns), *args, whole, step, columns)
    return whole if max(a.ndim, b.ndim) > 2 else whole[0]
