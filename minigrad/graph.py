"""The graph that ops leave behind, and the way back through it: Node, and `walk`, which sends a gradient from the loss
to the parameters.

Why the order of the walk matters. Where a value is used twice, its gradients from both uses must have met before
it hands anything on:

    a = Tensor(2.0, requires_grad=True)
    b = a * a            # used twice below
    c = b * 3.0
    d = c + b            # d = 3a² + a², dd/da = 8a = 16

A walk that goes on at once reaches b through c with the gradient 3 and sends 3·2a = 12 to a; then it reaches b again,
from d itself, with 1. If b now sends all it has, 4·2a, a ends with 28: the first part is counted twice. If it sends the
new part alone, 1·2a, the sum is right, but b has run twice, and so does all below it: once for every path from the
loss, and nine Inception modules of four branches have 4 to the power of nine. In reverse topological order (d, c, b, a)
every user of b comes before b: the parts 3 and 1 are summed first, and b hands on 4·2a once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from minigrad.backend import array_module
from minigrad.errors import GraphError
from minigrad.kernels import kernels
from minigrad.layout import Array

Tensor = Any  # minigrad.tensor's, which builds on this file
Watcher = Callable[..., None]

recording: ContextVar[bool] = ContextVar("recording", default=True)
# Called for every op with (op, outputs, inputs, node or None, multiply-adds of each output): how `watch` sees it.
watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def no_grad() -> AbstractContextManager[None]:
    """Within the block nothing is recorded: no graph, nothing kept for backward. Holds for this thread alone."""
    return _set(False)


def grad_enabled() -> AbstractContextManager[None]:
    """Within the block ops are recorded, whatever holds around it."""
    return _set(True)


@contextmanager
def _set(on: bool) -> Iterator[None]:
    token = recording.set(on)
    try:
        yield
    finally:
        recording.reset(token)


class Changes:
    """How often the values of a tensor have been changed in place, and by what at last. Its views share the count."""

    count = 0
    by = ""


class Node:
    """One recorded op in the graph. It knows its inputs' nodes and its `backward`, not its output's data:
    what is kept in memory until backward is exactly what the `backward` closure names."""

    __slots__ = ("backward", "dtype", "inputs", "kept", "name", "owner", "parts", "shape")

    def __init__(
        self,
        name: str,
        data: Array,
        inputs: tuple[Node | None, ...],
        backward: Callable[..., Any] | None,
        kept: Sequence[Tensor | None] = (),
        parts: int = 1,
    ):
        self.name = name
        self.shape, self.dtype = data.shape, data.dtype
        self.inputs = inputs
        self.backward = backward
        # The tensors whose values `backward` reads, as they were: what counts their changes, and how many there were.
        self.kept = [(t.changes, t.changes.count, type(t), t.data.shape) for t in kept if t is not None] if kept else ()
        self.parts = parts  # how many results the op has
        self.owner: weakref.ref[Tensor] | None = None  # the tensor whose .grad is wanted: a leaf, or retain_grad


class Part:
    """The gradient of one of an op's several results, on its way to that op."""

    __slots__ = ("gradient", "index")

    def __init__(self, index: int, gradient: Array):
        self.index, self.gradient = index, gradient


def walk(root: Node, gradient: Array) -> None:
    """Send `gradient` from `root` back through the graph, every node after all of its users."""
    gradients: dict[Node, Any] = {root: gradient}  # an array, or a list of them for an op with several results
    # The first gradient that reaches a node is only borrowed, the second makes a sum of our own, from the third on that
    # sum is added to in place. `ours` are the nodes that have one.
    ours: set[Node] = set()
    for node in reversed(_topological(root)):
        dy = gradients.pop(node, None)
        if dy is not None and node.owner is not None and (tensor := node.owner()) is not None:
            _hand_over(dy, node, tensor)
        backward, node.backward = node.backward, None  # frees what it kept, after this turn of the loop
        if not node.inputs or dy is None:  # a leaf, or an op that had no gradient for its input stands between
            continue
        if backward is None:
            raise GraphError(
                f"backward() reached '{node.name}' a second time, but what it kept was freed after the first: "
                "compute the loss again before every backward(), and sum losses before one common backward()"
            )
        if node.kept:
            _check_unchanged(node)
        results = backward(dy)
        if not isinstance(results, (tuple, list)):
            results = (results,)
        if len(results) != len(node.inputs):
            raise GraphError(
                f"backward of '{node.name}' returned {len(results)} gradients for {len(node.inputs)} inputs: "
                "return one for each, None where there is none"
            )
        # Whoever holds a .grad must not share its memory with these.
        handed_out = [part for part in dy if part is not None] if isinstance(dy, list) else [dy]
        for parent, dx in zip(node.inputs, results, strict=True):
            if parent is None or dx is None:
                continue
            if isinstance(dx, Part):
                gradients.setdefault(parent, [None] * parent.parts)[dx.index] = dx.gradient
                continue
            _check(node, parent, dx)
            dx = array_module(dx).asarray(dx)  # NumPy's 0-d results are scalars
            if parent in gradients:
                so_far = gradients[parent]
                gradients[parent] = kernels(dx).add(so_far, dx, so_far if parent in ours else None)
                ours.add(parent)
            elif parent.owner is not None and any(array_module(dx).may_share_memory(dx, other) for other in handed_out):
                gradients[parent] = dx.copy("K")  # it will be somebody's .grad, which must not change with another's
            else:
                gradients[parent] = dx
            handed_out.append(dx)


def _topological(root: Node) -> list[Node]:
    """Every node that root depends on, inputs before users; iterative, so that depth is no limit."""
    order: list[Node] = []
    seen = {root}
    stack: list[tuple[Node, Iterator[Node | None]]] = [(root, iter(root.inputs))]
    while stack:
        node, inputs = stack[-1]
        for parent in inputs:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(parent.inputs)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _hand_over(gradient: Array, node: Node, tensor: Tensor) -> None:
    """Add a gradient to the `.grad` of the tensor that wants it: of a leaf, unless it has been frozen since."""
    moved = tensor.node is not node and array_module(tensor.data) is not array_module(gradient)
    if moved or tensor.dtype != node.dtype:
        raise GraphError(
            f"backward() has a gradient for a {type(tensor).__name__} of shape {node.shape} that has been moved or "
            "converted since forward (model.to, model.astype): call backward() before, or compute the loss again"
        )
    if tensor.requires_grad or node.inputs:
        tensor.grad = gradient if tensor.grad is None else kernels(gradient).add(tensor.grad, gradient, None)


def _check_unchanged(node: Node) -> None:
    """Raise GraphError where a value that the op kept for backward has been changed in place: the gradient would be
    that of no function."""
    for changes, count, kind, shape in node.kept:
        if changes.count != count:
            raise GraphError(
                f"backward of '{node.name}' needs a {kind.__name__} of shape {shape} as it was in forward, and "
                f"{changes.by} has changed it since: call backward() before, or compute the loss again"
            )


def _check(node: Node, parent: Node, dx: Array) -> None:
    """Raise GraphError where a backward returned something that is no gradient of its input."""
    if not hasattr(dx, "strides"):  # a tensor has none either
        raise GraphError(
            f"backward of '{node.name}' returned a {type(dx).__name__}, not an array: compute with the .data of tensors"
        )
    if dx.shape != parent.shape or dx.dtype != parent.dtype:
        raise GraphError(
            f"backward of '{node.name}' returned {dx.dtype} {dx.shape} for an input of {parent.dtype} {parent.shape}: "
            "a gradient has its input's shape and dtype"
        )
