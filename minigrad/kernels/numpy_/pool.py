"""Pooling: across the columns, then down the rows, each a few ufuncs on shifted parts of a block.

With a stride s a cell of the kernel falls on every s-th row or column: on neighbours in one of the image's s phases,
which are its cells r, r + s, r + 2s, … along that axis.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minigrad.kernels.numpy_.blocks import (
    BLOCK_BYTES,
    BYTE,
    Block,
    by_image,
    cut,
    each,
    keep_where,
    rows,
    scratch,
)
from minigrad.layout import Array, Pair, Window, empty_images

Index = tuple[slice, ...]


def max_pool(x: Array, window: Window) -> Array:
    return maximum_of_windows(x, window, None)


def max_pool_winners(x: Array, window: Window) -> tuple[Array, list[Array]]:
    n, c, h, _ = x.shape
    oh, ow = window.output
    winners = [empty_images(np, (n, c, *size), BYTE) for size in ((h, ow), (oh, ow))]
    return maximum_of_windows(x, window, winners), winners


def maximum_of_windows(x: Array, window: Window, winners: list[Array] | None) -> Array:
    y = empty_images(np, (*x.shape[:2], *window.output), x.dtype)

    def block(part: Block) -> None:
        # Columns first, then rows: the first row that has the maximum, and in it the first column, is the first cell in
        # row-major order.
        seen = seen_rows(window, part)
        source, out = rows(x, (part[0], seen)), rows(y, part)
        across = scratch("across", (*source.shape[:2], *out.shape[2:]), x.dtype)
        won = (rows(winners[0], (part[0], seen)), rows(winners[1], part)) if winners else (None, None)
        columns = phases(source, 1, window.stride)
        if len(columns) > 1:
            apart = side_by_side(columns)
            for copy, column in zip(apart, columns, strict=True):
                copy[...] = column
            columns = apart
        maximum_of(columns, taps(window, 1), across, won[0])
        maximum_of(phases(across, 0, window.stride), taps(window, 0, part[1], seen), out, won[1])

    each(block, cut(len(x), window.output, x.itemsize * x.shape[1], block_budget(window)))
    return y


def max_pool_dx(dy: Array, winners: list[Array], window: Window) -> Array:
    dx = empty_images(np, (*dy.shape[:2], *window.input), dy.dtype)

    def block(parts: list[Block]) -> None:
        alone = len(parts) == 1  # else they are bands of one image, and where their windows overlap gradients add up
        if not alone:
            rows(dx, (parts[0][0], slice(None)))[...] = 0
        for part in parts:
            # dy goes back the way the maximum came: down the rows, then across the columns.
            seen = slice(0, window.input[0]) if alone else seen_rows(window, part)
            upstream, target = rows(dy, part), rows(dx, (part[0], seen))
            d_across = scratch("across", (*target.shape[:2], *upstream.shape[2:]), dy.dtype)
            down = phases(d_across, 0, window.stride)
            hand_to(rows(winners[1], part), upstream, taps(window, 0, part[1], seen), down)
            columns = phases(target, 1, window.stride)
            sums = columns if alone and len(columns) == 1 else side_by_side(columns)
            hand_to(rows(winners[0], (part[0], seen)), d_across, taps(window, 1), sums)
            for column, total in zip(columns, sums, strict=True):
                if not alone:
                    column += total
                elif total is not column:
                    column[...] = total

    each(block, by_image(cut(len(dy), window.output, dy.itemsize * dy.shape[1], block_budget(window))))
    return dx


def block_budget(window: Window) -> int:
    """Bytes of a block's output. Twice the usual, since a maximum is many short calls; not with a stride, where the
    input is larger, and its columns are copied apart."""
    return 2 * BLOCK_BYTES if window.stride == (1, 1) else BLOCK_BYTES


def phases(x: Array, axis: int, stride: Pair) -> list[Array]:
    """Cells r, r + s, r + 2s, … along an axis (0: rows, 1: columns) for each r < s: views."""
    before = (slice(None),) * (axis + 1)
    return [x[(*before, slice(r, None, stride[axis]))] for r in range(stride[axis])]


def side_by_side(columns: list[Array]) -> list[Array]:
    """Working memory for phases of columns. In the image their pixels are no neighbours, and on rows of only C values
    a ufunc takes up to four times as long, a copy hardly longer."""
    return [scratch(f"phase {r}", column.shape, column.dtype) for r, column in enumerate(columns)]


def taps(window: Window, axis: int, out: slice | None = None, seen: slice | None = None) -> list[Tap]:
    """For each cell of the kernel along an axis: the output cells for which it falls inside the image, and the input
    cells it falls on.

    out, seen   a band: which output cells, and which input cells, both then counted from their start
    """
    size, k, s, p, count = (pair[axis] for pair in window)
    first, last = (out.start, out.stop) if out else (0, count)
    start = seen.start if seen else 0
    found = []
    for v in range(k):
        low, high = max(first, -((v - p) // s)), min(last, (size - 1 + p - v) // s + 1)  # 0 ≤ i·s − p + v < size
        if low < high:
            found.append(Tap(axis, v, slice(low - first, high - first), low * s - p + v - start, s))
    return found


class Tap(NamedTuple):
    """One cell of the kernel along an axis of (images, rows, columns, C)."""

    axis: int  # 0: rows, 1: columns
    number: int  # which cell of the kernel, from 0
    out: slice  # the output cells for which it falls inside the image
    first: int  # the input cell it falls on for the first of them
    stride: int

    @property
    def phase(self) -> int:
        return self.first % self.stride

    def cells(self, start: int = 0, stop: int | None = None) -> tuple[Index, Index]:
        """Where in the output and where in the phase of the input, for output cells from `start` to before `stop`."""
        start, stop = max(start, self.out.start), self.out.stop if stop is None else min(stop, self.out.stop)
        first = self.first // self.stride + start - self.out.start
        before = (slice(None),) * (self.axis + 1)
        return (*before, slice(start, stop)), (*before, slice(first, first + stop - start))


def seen_rows(window: Window, part: Block) -> slice:
    """The input rows that the windows of a band see."""
    top = part[1].start * window.stride[0] - window.padding[0]
    bottom = (part[1].stop - 1) * window.stride[0] - window.padding[0] + window.kernel[0]
    return slice(max(top, 0), min(bottom, window.input[0]))


def maximum_of(source: list[Array], cells: list[Tap], best: Array, winner: Array | None = None) -> None:
    """best = the maximum over the cells of the kernel, winner = the number of the first cell that has it; source in
    phases."""
    first, *others = cells
    # Where the second cell of the kernel falls inside the image too, it is compared with the first right away.
    alone = max(first.out.start, others[0].out.stop) if others else first.out.start

    def begin(tap: Tap, start: int, stop: int) -> None:
        if start < stop:
            o, i = tap.cells(start, stop)
            best[o] = source[tap.phase][i]
            if winner is not None:
                winner[o] = tap.number

    begin(first, alone, first.out.stop)
    reached = first.out.start  # from here on, output cells have met a cell of the kernel already
    for tap in others:
        begin(tap, tap.out.start, min(reached, tap.out.stop))
        if reached < tap.out.stop:
            o, i = tap.cells(start=reached)
            second = tap is others[0]
            this = source[tap.phase][i]
            before = source[first.phase][first.cells(stop=tap.out.stop)[1]] if second else best[o]
            if winner is not None:
                larger = winner[o] if second else scratch("mask", before.shape, BYTE)
                np.greater(this, before, out=larger.view(bool))
                larger *= BYTE.type(tap.number)
                if not second:
                    np.maximum(larger, winner[o], out=winner[o])
                elif first.number > 0:
                    np.maximum(larger, BYTE.type(first.number), out=larger)
            np.maximum(before, this, out=best[o])
        reached = tap.out.start


def hand_to(winner: Array, upstream: Array, cells: list[Tap], targets: list[Array]) -> None:
    """targets = for each cell of the phases of an image the sum of `upstream` over the windows that it won."""
    for phase, target in enumerate(targets):
        own = [tap for tap in cells if tap.phase == phase]
        # A cell that meets all of both, as the middle one does at stride 1, comes first: it leaves nothing to fill.
        complete = [tap for tap in own if upstream[tap.cells()[0]].shape == upstream.shape == target.shape]
        first = complete[0] if complete else None
        if first is None:
            target.fill(0)
        for tap in sorted(own, key=lambda tap: tap is not first):
            o, i = tap.cells()
            won = scratch("mask", upstream[o].shape, BYTE).view(bool)
            np.equal(winner[o], BYTE.type(tap.number), out=won)
            if tap is first:
                keep_where(won, upstream, out=target)
                continue
            taken = scratch("taken", won.shape, upstream.dtype)
            keep_where(won, upstream[o], out=taken)
            np.add(target[i], taken, out=target[i])


def avg_pool(x: Array, window: Window, count_padding: bool) -> Array:
    y = empty_images(np, (*x.shape[:2], *window.output), x.dtype)
    share = reciprocal_counts(window, count_padding, x.dtype)

    def block(part: Block) -> None:
        seen = seen_rows(window, part)
        source, out = rows(x, (part[0], seen)), rows(y, part)
        across = np.zeros((*source.shape[:2], window.output[1], source.shape[3]), x.dtype)
        add_up(phases(source, 1, window.stride), taps(window, 1), across)
        out.fill(0)
        add_up(phases(across, 0, window.stride), taps(window, 0, part[1], seen), out)
        out *= share[part[1]]

    each(block, cut(len(x), window.output, x.itemsize * x.shape[1], BLOCK_BYTES))
    return y


def avg_pool_dx(dy: Array, window: Window, count_padding: bool) -> Array:
    n, c = dy.shape[:2]
    dx = empty_images(np, (n, c, *window.input), dy.dtype)
    share = reciprocal_counts(window, count_padding, dy.dtype)

    def block(parts: list[Block]) -> None:
        rows(dx, (parts[0][0], slice(None)))[...] = 0
        for part in parts:
            seen = seen_rows(window, part)
            spread = rows(dy, part) * share[part[1]]
            d_across = np.zeros((len(spread), seen.stop - seen.start, window.output[1], c), dy.dtype)
            spread_out(spread, taps(window, 0, part[1], seen), phases(d_across, 0, window.stride))
            spread_out(d_across, taps(window, 1), phases(rows(dx, (part[0], seen)), 1, window.stride))

    each(block, by_image(cut(n, window.output, dy.itemsize * c, BLOCK_BYTES)))
    return dx


def add_up(source: list[Array], cells: list[Tap], total: Array) -> None:
    """total += the sum over the cells of the kernel; source in phases."""
    for tap in cells:
        o, i = tap.cells()
        total[o] += source[tap.phase][i]


def spread_out(upstream: Array, cells: list[Tap], targets: list[Array]) -> None:
    """targets, in phases, += for each cell the sum of `upstream` over its windows."""
    for tap in cells:
        o, i = tap.cells()
        targets[tap.phase][i] += upstream[o]


def reciprocal_counts(window: Window, count_padding: bool, dtype: np.dtype) -> Array:
    """1 / the number of cells each output pixel averages over: (OH, OW, 1)."""
    counts = []
    for size, k, s, p, out in zip(*window, strict=True):
        first, last = (-p, size + p) if count_padding else (0, size)
        starts = np.arange(out) * s - p
        counts.append(np.minimum(starts + k, last) - np.maximum(starts, first))
    return (1.0 / np.outer(*counts)).astype(dtype)[:, :, None]
