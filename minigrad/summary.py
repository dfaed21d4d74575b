"""What a model consists of: shapes, parameters, cost, and the memory it holds until backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minigrad import backend
from minigrad.errors import ShapeError
from minigrad.layout import LINE, Array, empty_images
from minigrad.nn.module import Module
from minigrad.random import Key
from minigrad.tensor import Backward, Tensor
from minigrad.watch import Event, columns, each_op, untouched


class Row(NamedTuple):
    """One layer, figures for one image."""

    path: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    saved_bytes: int


class Summary(NamedTuple):
    """The rows of `summary`, and their totals."""

    rows: list[Row]
    parameters: int
    multiply_adds: int
    saved_bytes: int

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "kind", "output", "parameters", "multiply-adds", "bytes kept")]
        for row in self.rows:
            shape = "×".join(map(str, row.output))
            lines.append((row.path, row.kind, shape, *(f"{n:,}" for n in row[3:])))
        totals = (self.parameters, self.multiply_adds, self.saved_bytes)
        lines.append(("total", "", "", *(f"{n:,}" for n in totals)))
        return columns(lines, left=3)

    def __repr__(self) -> str:  # what a notebook or a prompt shows
        return str(self)


def summary(model: Module, input_shape: tuple[int, ...], *, depth: int | None = None) -> Summary:
    """Run one training forward pass on zeros and count; a row for each layer that computes, in definition order.

    input_shape    (C, H, W)
    depth          fold layers deeper than this into their ancestor: 1 gives the rows of a paper's table
    parameters     of the layer itself; multiply_adds and saved_bytes are per image
    saved_bytes    what the ops' backward closures hold that nothing before them held, without the parameters: half of
                   what two images make them hold, in which the few values per channel count half

    The pass leaves no trace: running statistics, modes and keys are put back.
    """
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3 or min(input_shape) < 1:
        raise ShapeError(f"summary wants the shape of one image, (C, H, W), each at least 1, got {input_shape}")
    if depth is not None and depth < 0:
        raise ShapeError(f"summary wants a depth of at least 0, got {depth}")
    batch = 2  # batch norm on a 1×1 map needs two values per channel
    xp, dtype = backend.default_module(), next((p.dtype for p in model.parameters()), np.dtype("float32"))
    x = Tensor(empty_images(xp, (batch, *input_shape), dtype))
    x.data[...] = 0
    counter = _Counter(model, depth)
    with untouched(model):
        model.train().set_key(Key(0))
        with each_op(model, counter.op):
            model(x)
    parameters = dict.fromkeys(counter.rows, 0)
    for name, parameter in model.named_parameters():  # each belongs to the innermost layer that has a row
        holders = [path for path in parameters if not path or name.startswith(f"{path}.")]
        if holders:
            parameters[max(holders, key=len)] += parameter.size
    rows = [
        row._replace(
            parameters=parameters[path],
            multiply_adds=row.multiply_adds // batch,
            saved_bytes=row.saved_bytes // batch,
        )
        for path, row in counter.rows.items()
    ]
    last: dict[str, int] = {}  # of each module the last one within it: branches that run at once are still told in turn
    for i, (path, _) in enumerate(model.named_modules()):
        names = path.split(".")
        last |= {".".join(names[:n]): i for n in range(len(names) + 1)}
    order = {path: (i, -len(path)) for path, i in last.items()}
    rows = [row for _, row in sorted(zip(counter.rows, rows, strict=True), key=lambda pair: order[pair[0]])]
    total = sum(parameter.size for parameter in model.parameters())
    return Summary(rows, total, sum(r.multiply_adds for r in rows), sum(r.saved_bytes for r in rows))


class _Counter:
    """Sees every op, and counts it for its layer."""

    def __init__(self, model: Module, depth: int | None):
        self.modules = dict(model.named_modules())
        self.depth = depth
        self.rows: dict[str, Row] = {}
        self.seen = {id(_owner(tensor.data)) for tensor in model._named(Tensor) for tensor in tensor[1:]}
        self.held: list[Array] = []  # so that no id is used twice

    def op(self, event: Event) -> None:
        path = ".".join(event.path.split(".")[: self.depth])
        row = self.rows.get(path)
        if row is None:
            row = Row(path or "(model)", type(self.modules[path]).__name__, (), 0, 0, 0)
        self.rows[path] = row._replace(
            output=event.outputs[0][1].shape[1:],
            multiply_adds=row.multiply_adds + event.multiply_adds,
            saved_bytes=row.saved_bytes + self._kept(event.backward),
        )

    def _kept(self, backward: Backward | None) -> int:
        total = 0
        for array in _arrays_in(backward, set()):
            owner = _owner(array)
            if id(owner) not in self.seen:
                self.seen.add(id(owner))
                self.held.append(owner)
                aligned = owner.dtype != array.dtype  # by `layout.empty`, in somewhat more bytes
                total += math.prod(owner.shape) * owner.dtype.itemsize - (LINE if aligned else 0)
        return total


def _arrays_in(value: Any, visited: set[int]) -> Iterator[Array]:
    """Every array that a closure, or what it names, holds."""
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        yield value.data
    elif hasattr(value, "strides") and hasattr(value, "dtype"):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _arrays_in(item, visited)
    elif callable(value):
        for cell in getattr(value, "__closure__", None) or ():
            yield from _arrays_in(cell.cell_contents, visited)


def _owner(array: Array) -> Array:
    """The array whose memory a view shares: what is held, even if the view is of a part of it."""
    while hasattr(array.base, "dtype"):
        array = array.base
    return array
