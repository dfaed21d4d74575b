"""Arenas: many tensors as neighbours in one array, to be updated, averaged or clipped together.

A network has hundreds of parameters, most of them small. Array by array, a step spends its time in calls; in an arena
it is the textbook formula on a few long arrays: on blocks that fit a core's cache on the host, spread over the threads;
on the whole on a GPU.

    arena = Arena(parameters)      # from now on parameter.data is a view of arena.data
    sums = arena.zeros()           # another array like it, and a view for each parameter
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from minigrad.backend import array_module
from minigrad.errors import BackendError, MinigradError
from minigrad.kernels import kernels
from minigrad.layout import LINE, Array
from minigrad.threads import each

BLOCK = 32768  # values: with its gradient, its state and a temporary array a block stays in a core's cache


class Values(NamedTuple):
    """One array in a layout."""

    flat: Array  # all of it, one axis
    views: list[Array]  # each of the arrays that lie in it


class Block(NamedTuple):
    """A part of an array in a layout."""

    values: slice
    pieces: list[
        tuple[int, Any]
    ]  # on the host, of what it consists: the number of an array, and some rows of it or ...


class Layout:
    """Where arrays of these shapes lie in one array: rank 4 channels-last, others in C order.

    Each starts at a multiple of 64 bytes; between them are zeros.

    arrays   at least one; all of one dtype and backend
    """

    def __init__(self, arrays: Sequence[Array]):
        self.xp: Any = array_module(arrays[0])
        self.like = self.xp.empty(0, arrays[0].dtype)
        self.shapes = [x.shape for x in arrays]
        line = LINE // self.like.dtype.itemsize
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.starts = [0, *accumulate(-(-size // line) * line for size in self.sizes)]  # and where the last one ends
        self.cuts: dict[tuple[int, int], list[Block]] = {}  # `blocks`, made once
        self.kernel: Any = None  # on a GPU: gathers, made when it is first needed

    def zeros(self) -> Values:
        """A new array of zeros in this layout. On the host it takes memory as it is written."""
        length, dtype = self.starts[-1], self.like.dtype
        if self.xp is not np:
            return self.cut(self.xp.zeros(length, dtype))
        memory = np.zeros(length * dtype.itemsize + LINE, np.uint8)
        return self.cut(np.ndarray(length, dtype, memory, -memory.__array_interface__["data"][0] % LINE))

    def cut(self, flat: Array) -> Values:
        """An array in this layout, with its views."""
        return Values(flat, [self.stack(flat, i, i + 1)[0, ...] for i in range(len(self.shapes))])

    def stack(self, flat: Array, first: int, last: int) -> Array:
        """The neighbours first … last − 1, which have one shape, as one view (last − first, *shape)."""
        shape, count = self.shapes[first], last - first
        rows = flat[self.starts[first] : self.starts[last]].reshape(count, -1)[:, : self.sizes[first]]
        if len(shape) != 4:
            return rows.reshape(count, *shape)
        n, c, h, w = shape
        return rows.reshape(count, n, h, w, c).transpose(0, 1, 4, 2, 3)

    def blocks(self, first: int = 0, last: int | None = None) -> list[Block]:
        """The arrays first … last − 1, and what is between them: in blocks on the host, all in one on a GPU."""
        last = len(self.shapes) if last is None else last
        if (first, last) not in self.cuts:
            whole = Block(slice(self.starts[first], self.starts[last]), [])
            self.cuts[first, last] = [whole] if self.xp is not np else list(self._cut(first, last))
        return self.cuts[first, last]

    def _cut(self, first: int, last: int) -> Iterator[Block]:
        """Blocks of about BLOCK values, which end between two arrays, or two rows of a large one."""
        begin, pieces = self.starts[first], []
        for i in range(first, last):
            rows = self.shapes[i][0] if self.sizes[i] > BLOCK else 1
            row = self.sizes[i] // rows
            step = -(-BLOCK // max(row, 1)) if rows > 1 else 1
            for j in range(0, rows, step):
                is_last = j + step >= rows
                end = self.starts[i + 1] if is_last else self.starts[i] + (j + step) * row
                pieces.append((i, slice(j, j + step) if rows > 1 else ...))
                if end - begin >= BLOCK or (is_last and i + 1 == last):
                    yield Block(slice(begin, end), pieces)
                    begin, pieces = end, []

    def check(self, arrays: Sequence[Array | None]) -> None:
        """Raise MinigradError for a gradient of another shape or dtype than its parameter, BackendError for one of
        another backend."""
        kind = self.like.dtype
        for x, shape in zip(arrays, self.shapes, strict=True):
            if x is None:
                continue
            if x.shape != shape or x.dtype != kind:
                raise MinigradError(f"a gradient is {x.dtype} {x.shape}, its parameter {kind} {shape}")
            if type(x) is not type(self.like) and array_module(x) is not self.xp:
                here, there = self.xp.__name__, array_module(x).__name__
                raise BackendError(f"a gradient {shape} is an array of {there}, its parameter one of {here}")

    def gather(self, arrays: Sequence[Array | None], into: Values) -> None:
        """Copy arrays, in any memory order, to their places; the place of None keeps its values."""
        if self.xp is np:
            each(lambda block: self.gather_block(arrays, into, block), self.blocks())
        elif not hasattr(kernels(self.like), "Gather"):  # the textbook has no launches to save
            for view, x in zip(into.views, arrays, strict=True):
                if x is not None:
                    view[...] = x
        else:
            self.kernel = self.kernel or kernels(self.like).Gather(self.like, self.sizes, self.starts)
            self.kernel(arrays, into.flat)

    def gather_block(self, arrays: Sequence[Array | None], into: Values, block: Block) -> None:
        """The same on the host, for one block."""
        for i, rows in block.pieces:
            x = arrays[i]
            if x is not None:
                into.views[i][rows] = x[rows]

    def finish_capture(self) -> Array:
        """Complete the CUDA graph in which `gather` has been captured; keep what is returned as long as the graph."""
        return self.kernel.finish_capture() if self.kernel is not None else None


class Arena(Layout):
    """Tensors moved into one array, `data`: each tensor's .data is a view of it, in place of the array it was."""

    def __init__(self, tensors: Sequence[Any]):
        super().__init__([tensor.data for tensor in tensors])
        self.tensors = list(tensors)
        self.data, self.views = self.zeros()
        for tensor, view in zip(self.tensors, self.views, strict=True):
            view[...] = tensor.data
            tensor.data = view  # frees the array that it was, unless somebody else holds it

    def refresh(self, owner: str) -> None:
        """Take back the values of tensors whose .data has been replaced since, and make it a view again.

        Raises BackendError, and changes nothing, if one is now of another backend, dtype or shape.
        """
        moved = [(t, view) for t, view in zip(self.tensors, self.views, strict=True) if t.data is not view]
        for tensor, view in moved:
            now, before = (f"{x.dtype} {x.shape} on {array_module(x).__name__}" for x in (tensor.data, view))
            if now != before:
                raise BackendError(
                    f"{owner}: a tensor was {before} and is {now}: build a new {owner} after a model has moved, and "
                    "give it the state of this one"
                )
        for tensor, view in moved:
            view[...] = tensor.data
            tensor.data = view


def arenas(tensors: Iterable[Any]) -> list[Arena]:
    """Move tensors into arenas, one for each dtype, in the order given.

    Raises BackendError if they lie on two backends, MinigradError if two share their memory, as they could no longer.
    """
    kinds: dict[Any, list[Any]] = {}
    modules, seen = set(), set()
    for tensor in tensors:
        x = tensor.data
        modules.add(array_module(x).__name__)
        address = x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else x.data.ptr
        if x.size and address in seen:
            raise MinigradError(f"two tensors {x.shape} share their memory: give each a .data of its own")
        seen.add(address)
        kinds.setdefault(x.dtype, []).append(tensor)
    if len(modules) > 1:
        raise BackendError(f"tensors lie on {' and '.join(sorted(modules))}: bring them together, with model.to")
    return [Arena(its) for its in kinds.values()]


def spread(xp: Any, work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call work(item) for every item: over the threads on the host, one after the other on a GPU."""
    if xp is np:
        each(work, items)
    else:
        for item in items:
            work(item)


def clip(arrays: Sequence[Array], max_norm: float) -> Array:
    """Scale arrays, in place, by one factor to a joint norm of at most `max_norm`: see minigrad.optim.clip_by_norm."""
    if not max_norm > 0.0:
        raise MinigradError(f"max_norm must be above 0, got {max_norm}")
    if not arrays:
        return np.zeros(())
    xp: Any = array_module(arrays[0])
    squares: list[Any] = [None] * len(arrays)

    def add_up(i: int) -> None:
        squares[i] = xp.sum(xp.square(arrays[i], dtype=xp.float64))

    def scale(array: Array) -> None:
        array *= factor.astype(array.dtype)

    spread(xp, add_up, range(len(arrays)))
    norm = xp.sqrt(sum(squares))
    factor = xp.where(xp.isfinite(norm), xp.minimum(1.0, max_norm / (norm + 1e-6)), 1.0)
    spread(xp, scale, arrays)
    return xp.asarray(norm)
