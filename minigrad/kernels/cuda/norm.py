"""Normalisation: sums over the pixels, batch norm, local response normalisation (norm.cu)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minigrad.backend import array_module
from minigrad.kernels.cuda.launch import block_shape, empty_matrix, launch, matrix, pack, part, side_by_side
from minigrad.layout import Array, images

PARTS = 1024  # about as many blocks share the rows where each leaves a part of a sum for a second kernel to add,
ROWS_EACH = 8  # but no thread adds fewer rows than this


# ---- Sums over the pixels, in two kernels: the parts of every block of rows, then their totals ----


def empty_parts(xp: Any, m: int, sums: int, channels: int, width: int) -> Array:
    """Room for (blocks of rows, sums, channels) in float64, for so many blocks as keep the GPU busy.

    m, width   rows, and threads across: the least of them where several launches share the room
    """
    across, down = block_shape(width)
    count = max(1, min(m // (ROWS_EACH * down), PARTS // -(-width // across)))
    return xp.empty((count, sums, channels), np.float64)


def column_sums(x: Array) -> Array:
    """Σ over the pixels of every channel: added in float64, returned in the dtype of x."""
    xp, (rows, ld), channels = array_module(x), matrix(x), x.shape[1]
    values, sums = pack(rows), xp.empty(channels, x.dtype)
    parts = empty_parts(xp, len(rows), 1, channels, channels // values)
    operands = rows, ld, parts, *rows.shape
    launch("dense", "column_sums_parts", x, *rows.shape, *operands, parts=len(parts), values=values)
    launch("dense", "column_sums", x, 1, channels, parts, len(parts), sums, channels, parts=1)
    return sums


def statistics(x: Array) -> tuple[Array, Array]:
    """Sums of what is left of x, and of its square, after each channel's first value is taken off."""
    xp, (rows, ld) = array_module(x), matrix(x)
    (m, channels), values = rows.shape, pack(rows)
    parts, (mean, var) = empty_parts(xp, m, 2, channels, channels // values), xp.empty((2, channels), np.float64)
    operands = rows, ld, parts, m, channels
    launch("norm", "statistics_parts", x, m, channels, *operands, parts=len(parts), values=values)
    launch("norm", "statistics", x, 1, channels, parts, len(parts), rows, mean, var, m, channels, parts=1)
    return mean, var


# ---- Batch norm ----


def move_running(running_mean: Array, running_var: Array, mean: Array, var: Array, n: int, momentum: float) -> None:
    """One launch."""
    numbers, c, xp = (n / (n - 1), float(momentum)), len(mean), array_module(mean)
    own = running_mean, running_var
    if all(x.flags.c_contiguous and x.dtype == running_mean.dtype and x.dtype.char in "fd" for x in own):
        moved = own
    else:  # as somebody has made them
        moved = xp.ascontiguousarray(running_mean, np.float64), xp.ascontiguousarray(running_var, np.float64)
    launch("norm", "move_running", moved[0], c, 1, *moved, mean, var, *numbers, c)
    for x, new in zip(own, moved, strict=True):
        if new is not x:
            x[...] = new


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, relu: bool) -> Array:
    """One pass."""
    rows, ld, y = *matrix(x), empty_matrix(x)
    channels = of_channels(mean, var, gamma, beta)
    operands = rows, ld, *channels, float(eps), relu, y, *rows.shape
    launch("norm", "batch_norm", x, *rows.shape, *operands, values=pack(rows, y))
    return images(y, x.shape[0], *x.shape[2:])


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
    """Two passes: dgamma and dbeta, then dx."""
    return batch_norm_dx_of_parts([dy], x, mean, var, gamma, beta, eps, relu, through_statistics)


def batch_norm_dx_of_parts(
    dys: list[Array],
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    relu: bool,
    through_statistics: bool,
) -> tuple[Array, Array, Array]:
    """The same where dy comes as columns that lie apart: each part is read where it is."""
    xp, (n, channels, h, w), dtype = array_module(x), x.shape, x.dtype
    m, numbers, sums = n * h * w, of_channels(mean, var, gamma, beta), xp.empty((2, channels), np.float64)
    dx, (dbeta, dgamma) = xp.empty((m, channels), dtype), xp.empty((2, channels), dtype)
    (rows, ld), operands = matrix(x), []
    for dy, own in side_by_side(dys):
        (dy_rows, dy_ld), x_rows, dx_rows = matrix(dy), part(rows, own), part(dx, own)
        given = dy_rows, dy_ld, x_rows, ld, *(part(a, own) for a in numbers), float(eps), relu
        operands.append((own, (m, dy.shape[1]), pack(dy_rows, x_rows, dx_rows), given, dx_rows))
    parts = empty_parts(xp, m, 2, channels, min(size[1] // values for _, size, values, _, _ in operands))
    count = len(parts)
    for own, size, values, given, _ in operands:
        into = part(parts, own), channels, *size
        launch("norm", "batch_norm_sums_parts", x, *size, *given, *into, parts=count, values=values)
    results = count, sums, dbeta, dgamma, channels
    launch("norm", "batch_norm_sums", x, 1, channels, parts, *results, parts=1)
    for own, size, values, given, dx_rows in operands:
        using = through_statistics, part(sums, own), dx_rows, channels, *size
        launch("norm", "batch_norm_dx", x, *size, *given, *using, values=values)
    return images(dx, n, h, w), dgamma, dbeta


def of_channels(mean: Array, var: Array, gamma: Array, beta: Array) -> list[Array]:
    """(C,) each, their values side by side; means and variances in float64: in evaluation they come as stored."""
    dtypes = (np.float64, np.float64, gamma.dtype, beta.dtype)
    xp = array_module(mean)
    return [xp.ascontiguousarray(a, dtype) for a, dtype in zip((mean, var, gamma, beta), dtypes, strict=True)]


# ---- Local response normalisation ----


def lrn(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """One pass."""
    rows, ld, y = *matrix(x), empty_matrix(x)
    constants = size, float(alpha), float(beta), float(k)
    launch("norm", "lrn", x, *rows.shape, rows, ld, *constants, y, *rows.shape)
    return images(y, x.shape[0], *x.shape[2:])


def lrn_dx(dy: Array, x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    """One pass; every neighbour's base is worked out again, which costs less than to store it."""
    rows, ld, dx = *matrix(x), empty_matrix(x)
    constants = size, float(alpha), float(beta), float(k)
    launch("norm", "lrn_dx", x, *rows.shape, *matrix(dy), rows, ld, *constants, dx, *rows.shape)
    return images(dx, x.shape[0], *x.shape[2:])
