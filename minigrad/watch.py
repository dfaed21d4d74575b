"""See every op of a training step as it runs: find the layer where NaN begins, time layers, follow a batch.

`each_op` hands you one event per op, forward and backward; what else is here, and `summary`, is a few lines on it.
To follow a batch through a network:

    with each_op(model, lambda e: print(e.direction, e.place, e.op, *[(name, x.std()) for name, x in e.outputs])):
        ops.cross_entropy(model(x), labels).backward()
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from minigrad.backend import array_module, to_host
from minigrad.errors import NonFiniteError
from minigrad.layout import Array
from minigrad.nn.module import Module, observer
from minigrad.tensor import Backward, Node, Tensor, watcher

Named = tuple[tuple[str, Array], ...]
Place = tuple[str, Module | None]  # a layer's path, and the layer


class Event(NamedTuple):
    """One op, run in one direction. Parameters are named by their path, other tensors "input 0", "input 1", …

    Layers that run as one op (see nn.together) have an event each: the time is shared out by their multiply-adds.
    Backward, one more event of the layer around them, which takes no time, has the gradient of what they share.
    """

    path: str  # of the innermost layer that runs; "" is the model itself, or nothing of it
    module: Module | None  # that layer; None outside the model, as for the loss
    op: str
    direction: str  # "forward" or "backward"
    inputs: Named  # forward: what it was computed from; backward: ("gradient", dy)
    outputs: Named  # forward: ("output", y); backward: the gradient of each input that needs one
    seconds: float  # forward: since the op before it, or since the model was called
    backward: Backward | None = None  # the closure, the same in both directions; None without a graph
    multiply_adds: int = 0

    @property
    def place(self) -> str:
        """The path, in words where it is empty."""
        return self.path or ("outside the model" if self.module is None else "(model)")


@contextmanager
def each_op(model: Module, see: Callable[[Event], None]) -> Iterator[Calls]:
    """Within the block, call `see` after every op, and after the backward of every op recorded in it.

    An exception that `see` raises ends the step. On a GPU every op is waited for. Holds for this thread; of two
    nested blocks the inner one alone sees.
    """
    calls = Calls(model, see)
    tokens = observer.set(calls), watcher.set(calls.op)
    try:
        yield calls
    finally:
        observer.reset(tokens[0])
        watcher.reset(tokens[1])


class Calls:
    """Knows which layer is running, makes the events, and counts the calls of the model."""

    def __init__(self, model: Module, see: Callable[[Event], None]):
        self.model, self.see, self.steps = model, see, 0
        self.paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self.names = {id(parameter): path for path, parameter in reversed(list(model.named_parameters()))}
        self.stack: list[tuple[Module, ...]] = []  # several where they run as one op
        self.mark = time.perf_counter()

    def enter(self, *modules: Module) -> None:
        """A call of a module begins; of several that run as one op."""
        self.steps += self.model in modules
        if not self.stack:
            self.mark = time.perf_counter()
        self.stack.append(modules)

    def leave(self, *modules: Module) -> None:
        """It ends."""
        self.stack.pop()
        if not self.stack:
            self.mark = time.perf_counter()

    def op(
        self,
        op: str,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor | None],
        node: Node | None,
        multiply_adds: Sequence[int],
    ) -> None:
        """An op has run: make its events, and have its backward make those of the way back."""
        seconds, total = _now(outputs[0].data) - self.mark, sum(multiply_adds)
        places = [self._place(i) for i in range(len(outputs))]
        # Several results have been computed at once: each gets its share of the time.
        shares = [cost / total if total else 1 / len(outputs) for cost in multiply_adds]
        names = [None if x is None else self.names.get(id(x), f"input {i}") for i, x in enumerate(inputs)]
        owners = [self._owner(x) for x in inputs]
        backward = None if node is None else node.backward
        if node is not None:
            wanted = [name if parent else None for name, parent in zip(names, node.inputs, strict=True)]
            node.backward = self._seen(op, [*places, self._place(None)], shares, wanted, owners, node.backward)
        for i, ((path, module), output) in enumerate(zip(places, outputs, strict=True)):
            given = tuple(
                (name, x.data)
                for name, owner, x in zip(names, owners, inputs, strict=True)
                if name and x is not None and owner in (None, i)
            )
            result, cost = (("output", output.data),), multiply_adds[i]
            self.see(Event(path, module, op, "forward", given, result, seconds * shares[i], backward, cost))
        self.mark = time.perf_counter()

    def _place(self, part: int | None) -> Place:
        """The innermost layer that runs: of several that run as one op the one named, or the layer around them.

        A layer held in a closure has no path: the nearest one around it that has stands for it.
        """
        for modules in reversed(self.stack):
            module = modules[0] if len(modules) == 1 else None if part is None else modules[part]
            if id(module) in self.paths:
                return self.paths[id(module)], module
        return "", None

    def _owner(self, x: Tensor | None) -> int | None:
        """Which of several layers that run as one op has the parameter x; None for what all of them see."""
        together = self.stack[-1] if self.stack and len(self.stack[-1]) > 1 else ()
        return next((i for i, module in enumerate(together) if any(x is p for p in module.parameters())), None)

    def _seen(
        self,
        op: str,
        places: Sequence[Place],  # of each result, and around them all
        shares: Sequence[float],
        wanted: Sequence[str | None],
        owners: Sequence[int | None],
        backward: Any,
    ) -> Any:
        """`backward`, followed by its events. It keeps no array alive that `backward` does not."""
        see = self.see

        def run(dy: Any) -> Any:
            dys = dy if isinstance(dy, list) else [dy]
            some = next(part for part in dys if part is not None)
            started = _now(some)
            results = backward(dy)
            seconds = _now(some) - started
            each = results if isinstance(results, (tuple, list)) else (results,)
            # What is no array, or one too many, is left to the engine, which says so.
            found = [
                (owner, (name, dx))
                for name, owner, dx in zip(wanted, owners, each, strict=False)
                if name and hasattr(dx, "dtype")
            ]
            given = [() if part is None else (("gradient", part),) for part in dys]
            if len(dys) == 1:
                see(Event(*places[0], op, "backward", given[0], tuple(dx for _, dx in found), seconds, backward))
                return results
            for i, (place, share) in enumerate(zip(places[:-1], shares, strict=True)):
                own = tuple(dx for owner, dx in found if owner == i)
                see(Event(*place, op, "backward", given[i], own, seconds * share, backward))
            # Then the gradient of what they share, so that one with a broken gradient is named before it.
            shared = tuple(dx for owner, dx in found if owner is None)
            if shared:
                see(Event(*places[-1], op, "backward", tuple(itertools.chain(*given)), shared, 0.0, backward))
            return results

        return run


def _now(array: Array) -> float:
    """The clock, after the device that holds `array` has done all it was told."""
    xp = array_module(array)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    return time.perf_counter()


@contextmanager
def untouched(model: Module) -> Iterator[None]:
    """Put running statistics, gradients, and the modules' own attributes (modes, keys) back after the block."""
    buffers = [(tensor, tensor.version, tensor.data.copy()) for _, tensor in model.named_buffers()]
    attributes = [(module, module.attributes()) for _, module in model.named_modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for tensor, version, before in buffers:
            tensor.data[...] = before
            if tensor.version != version:
                tensor.changed("putting it back after a trial")
        for module, own in attributes:
            vars(module).update(own)
        for parameter, gradient in gradients:
            parameter.grad = gradient


# ---- Where does NaN begin? ----


@contextmanager
def watch(model: Module) -> Iterator[dict[str, int]]:
    """Within the block, stop at the first op whose result, or whose gradient, is NaN or Inf.

        with watch(model):
            ops.cross_entropy(model(x), labels).backward()

    yields   how many ops have been checked: {"forward": …, "backward": …}
    raises   NonFiniteError with the layer's path, the op, the direction, what it was given, and what to try
    cost     one more pass over every result: for debugging. For everyday training see `first_non_finite`.
    """
    checked = {"forward": 0, "backward": 0}

    def see(event: Event) -> None:
        checked[event.direction] += 1
        for name, array in event.outputs:
            if not _finite(array):
                raise NonFiniteError(_sentence(event, name, array), event.place)

    with each_op(model, see), np.errstate(all="ignore"):  # NumPy would warn of what is reported here
        yield checked


def first_non_finite(model: Module, run_step: Callable[[], Any]) -> NonFiniteError | None:
    """Run a step again under `watch` and return what it raises; None if all is finite.

    For a training loop that finds a loss which is not finite: it pays nothing until then. Running statistics,
    modes and gradients are put back.

    run_step   forward, loss and backward on the same batch with the same keys, without the update: after an update
               with such gradients every weight is NaN, and the first layer would be blamed
    """
    with untouched(model):
        try:
            with watch(model):
                run_step()
        except NonFiniteError as error:
            return error
    return None


def _sentence(event: Event, name: str, array: Array) -> str:
    """What was found, in what, what it was made from, and what to do about it."""
    result = "its output" if event.direction == "forward" else f"its gradient of {name}"
    given = [(label, _finite(x), _contents(x)) for label, x in event.inputs]
    broken = [label for label, finite, _ in given if not finite]
    if event.direction == "backward":
        advice = (
            "the gradient came in broken: look at what was handed to backward(), or clip with optim.clip_by_norm and "
            "lower the learning rate, if finite gradients overflowed where branches meet"
            if broken
            else f"try a lower learning rate or optim.clip_by_norm, and gradcheck if {event.op} is your own op"
        )
    elif any(not label.startswith("input ") for label in broken):
        advice = (
            "the weights were broken before this step: go back to weights from before, with a lower learning rate or "
            "optim.clip_by_norm"
        )
    elif broken:
        advice = "it came in with the input: check the pictures and how they are normalised"
    else:
        advice = f"{event.op} itself overflowed or left its domain: try a lower learning rate, and check its input"
    inputs = ", ".join(f"{label} {contents}" for label, _, contents in given) or "nothing"
    return f"{event.op} ({event.direction}): {result} {_contents(array)}, made from {inputs}: {advice}"


def _finite(array: Array) -> bool:
    return bool(array_module(array).isfinite(array).all())


def _contents(array: Array) -> str:
    """Shape, range, and how much of it is not finite."""
    values = to_host(array)
    finite = values[np.isfinite(values)]
    nans, infs = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    bad = " and ".join(f"{count:,} {kind}" for count, kind in ((nans, "NaN"), (infs, "Inf")) if count)
    parts = [f"{bad} among {values.size:,} values" if bad else "finite"]
    if finite.size:
        parts.append(f"{'the rest ' if bad else ''}between {finite.min():.4g} and {finite.max():.4g}")
    return f"{values.shape} ({', '.join(parts)})"


# ---- Where does the time go? ----


class TimeRow(NamedTuple):
    """One layer, or one op of it: milliseconds per step."""

    path: str
    op: str
    forward: float
    backward: float
    share: float  # of the sum over all rows


class LayerTimes:
    """What `layer_times` has measured so far; printed, it is a table."""

    def __init__(self, model: Module, depth: int | None):
        self.modules, self.depth = dict(model.named_modules()), depth
        self.seconds: dict[tuple[str, str], dict[str, float]] = {}
        self.calls: Calls | None = None

    def see(self, event: Event) -> None:
        """Add an op's time to its layer's."""
        if not event.seconds:  # its time is in other events: see Event
            return
        path = ".".join(event.path.split(".")[: self.depth])
        op = event.op if self.depth is None or not path else type(self.modules[path]).__name__
        row = self.seconds.setdefault((path or event.place, op), {"forward": 0.0, "backward": 0.0})
        row[event.direction] += event.seconds

    @property
    def rows(self) -> list[TimeRow]:
        """In the order in which the layers ran."""
        total = sum(sum(row.values()) for row in self.seconds.values())
        ms = 1000 / max(self.calls.steps if self.calls else 0, 1)
        return [
            TimeRow(path, op, row["forward"] * ms, row["backward"] * ms, sum(row.values()) / total if total else 0.0)
            for (path, op), row in self.seconds.items()
        ]

    def __str__(self) -> str:
        lines = [("layer", "op", "forward ms", "backward ms", "share")]
        rows = self.rows
        total = TimeRow("total", "", sum(r.forward for r in rows), sum(r.backward for r in rows), 1.0)
        lines += [(r.path, r.op, f"{r.forward:.2f}", f"{r.backward:.2f}", f"{r.share:.1%}") for r in (*rows, total)]
        return columns(lines, left=2)

    def __repr__(self) -> str:  # what a notebook or a prompt shows
        return str(self)


@contextmanager
def layer_times(model: Module, *, depth: int | None = None) -> Iterator[LayerTimes]:
    """Within the block, measure how long every layer takes, forward and backward.

        step()                                # once before, so that caches are warm
        with layer_times(model) as times:
            for _ in range(3):
                step()
        print(times)

    depth   fold layers deeper than this into their ancestor, as in `summary`

    A step is a call of the model. Layers that run as one op share its time by their multiply-adds: see Event. Not
    measured: what is no op, as the update, or the sum where gradients meet.
    """
    times = LayerTimes(model, depth)
    with each_op(model, times.see) as times.calls:
        yield times


def columns(lines: Sequence[tuple[str, ...]], *, left: int) -> str:
    """Lines of cells as a table: the first `left` columns to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if i < left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
