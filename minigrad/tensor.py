"""Tensor, record, backward: a complete small autograd. Read this file first.

Every op computes an array and calls `record` with a function that sends a gradient back. `record` links the
result to its inputs; the links form a graph, and `backward` walks it from the loss to the parameters.

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

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from minigrad import backend
from minigrad.backend import MOVE, array_module
from minigrad.errors import BackendError, DtypeError, GraphError, ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array, elementwise, sum_to
from minigrad.threads import blas_on_one_thread

Backward = Callable[[Array], Array | Sequence[Array | None] | None]
Watcher = Callable[..., None]

_grad_enabled: ContextVar[bool] = ContextVar("grad_enabled", default=True)
# Called for every op with (op, outputs, inputs, node or None, multiply-adds of each output): how `watch` sees it.
watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def no_grad() -> AbstractContextManager[None]:
    """Within the block nothing is recorded: no graph, nothing kept for backward. Holds for this thread alone."""
    return _recording(False)


def grad_enabled() -> AbstractContextManager[None]:
    """Within the block ops are recorded, whatever holds around it."""
    return _recording(True)


@contextmanager
def _recording(on: bool) -> Iterator[None]:
    token = _grad_enabled.set(on)
    try:
        yield
    finally:
        _grad_enabled.reset(token)


class Node:
    """One recorded op in the graph. It knows its inputs' nodes and its `backward`, not its output's data:
    what is kept in memory until backward is exactly what the `backward` closure names."""

    __slots__ = ("backward", "dtype", "inputs", "name", "owner", "parts", "shape")

    def __init__(
        self,
        name: str,
        data: Array,
        inputs: tuple[Node | None, ...],
        backward: Callable[..., Any] | None,
        parts: int = 1,
    ):
        self.name = name
        self.shape, self.dtype = data.shape, data.dtype
        self.inputs = inputs
        self.backward = backward
        self.parts = parts  # how many results the op has
        self.owner: weakref.ref[Tensor] | None = None  # the tensor whose .grad is wanted: a leaf, or retain_grad


class Tensor:
    """An array with a gradient.

    data           a float32 or float64 array of either backend, or numbers (made float32 on the current backend)
    requires_grad  True for a leaf whose gradient `backward` shall leave in `.grad`
    """

    __slots__ = ("__weakref__", "data", "grad", "node", "requires_grad")
    __array_ufunc__ = None  # numpy_array * tensor is refused by NumPy and comes to our __rmul__

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        # Without this NumPy would make an array of one Tensor for each number.
        raise DtypeError("a NumPy function got a Tensor: hand it the array, x.numpy()")

    def __init__(self, data: Any, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise DtypeError("Tensor(...) got a Tensor: use it as it is, or .detach() it")
        if not hasattr(data, "dtype"):
            data = backend.asarray(_numbers(data), np.float32)
        if data.dtype not in (np.float32, np.float64):
            pictures = ", and divide pictures of 0 … 255 by 255" if data.dtype == np.uint8 else ""
            raise DtypeError(
                f"a Tensor holds float32 or float64, got {data.dtype}: convert with .astype('float32'){pictures}"
            )
        self.data: Array = array_module(data).asarray(data)  # NumPy reductions give scalars: make them 0-d arrays
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self.node: Node | None = None

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        # What copy and pickle take along. A copy is a leaf of its own: it has no part in the original's graph.
        return getattr(self, "__dict__", None), {
            "data": self.data,
            "grad": self.grad,
            "requires_grad": self.requires_grad,
            "node": None,
        }

    shape = property(lambda self: self.data.shape, doc="Sizes of the axes.")
    dtype = property(lambda self: self.data.dtype, doc="float32 or float64.")
    ndim = property(lambda self: self.data.ndim, doc="The number of axes.")
    size = property(lambda self: self.data.size, doc="The number of elements.")
    T = property(lambda self: self.transpose(), doc="All axes reversed.")

    @property
    def needs_grad(self) -> bool:
        """Whether an op on this tensor has to be recorded."""
        return _grad_enabled.get() and (self.requires_grad or (self.node is not None and self.node.inputs != ()))

    def __repr__(self) -> str:
        mark = f", from {self.node.name}" if self.node and self.node.backward else ""
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else mark})"

    def __len__(self) -> int:
        return len(self.data)

    def item(self) -> float:
        """The value of a tensor with one element, as a Python float. On a GPU this waits for it."""
        if self.size != 1:
            raise ShapeError(f"item() needs a tensor with one element, got shape {self.shape}")
        return float(self.data.reshape(()))

    def numpy(self) -> np.ndarray:
        """The data as a host array (shared with the tensor when it is on the host already)."""
        return backend.to_host(self.data)

    def detach(self) -> Tensor:
        """The same data, cut off from the graph."""
        return Tensor(self.data)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def retain_grad(self) -> Tensor:
        """Ask for this intermediate result's gradient: backward leaves it in `.grad`, as for a leaf."""
        if self.node is not None:
            self.node.owner = weakref.ref(self)
        elif not self.requires_grad:
            raise GraphError("retain_grad() on a tensor that no gradient flows through: nothing was recorded")
        return self

    def backward(self, gradient: Any = None) -> None:
        """Add d(self)/d(leaf), weighted by `gradient`, to `.grad` of every leaf this tensor was computed from.

        gradient   array of self's shape and dtype; may be left out for a tensor with one element (it is 1 then)

        What an op kept for backward is freed as soon as it has been used, so the graph can be walked once.
        First-order gradients only. Raises GraphError where there is no graph or it has been used.
        """
        if self.node is None or not self.node.inputs:
            hint = (
                "it is a leaf: call backward() on a loss computed from it"
                if self.requires_grad
                else "it was computed under no_grad(), or from nothing that requires a gradient"
            )
            raise GraphError(f"backward() on a tensor without a graph: {hint}")
        xp = array_module(self.data)
        if gradient is None:
            if self.size != 1:
                raise ShapeError(
                    f"backward() on a tensor of shape {self.shape} needs the upstream gradient: "
                    "pass one of that shape, or reduce to a single number first (for example .sum())"
                )
            gradient = xp.ones(self.shape, self.dtype)
        gradient = gradient.data if isinstance(gradient, Tensor) else gradient
        gradient = xp.array(gradient, dtype=self.dtype)  # a copy: the user's array is never handed on
        if gradient.shape != self.shape:
            raise ShapeError(f"backward() got a gradient of shape {gradient.shape} for a tensor of shape {self.shape}")
        with blas_on_one_thread():
            _walk(self.node, gradient)

    # --- arithmetic: each op is its formula, and how a gradient goes back through it

    def __add__(self, other: Any) -> Tensor:
        """x + y, with broadcasting. The gradient goes on to both as it is."""
        x, y = operands("add", self, other)
        a, b = x.shape, y.shape
        result = elementwise(array_module(x.data).add, x.data, y.data)
        return record("add", result, (x, y), lambda dz: (sum_to(dz, a), sum_to(dz, b)))

    def __mul__(self, other: Any) -> Tensor:
        """x · y, element by element, with broadcasting. dx = dz · y, dy = dz · x."""
        x, y = operands("multiply", self, other)
        a, b, multiply = x.shape, y.shape, array_module(x.data).multiply
        # Each factor is kept for the gradient of the other: of a tensor times a plain number, the number alone.
        left, right = x.data if y.needs_grad else None, y.data if x.needs_grad else None

        def backward(dz: Array) -> tuple[Array | None, Array | None]:
            dx = None if right is None else sum_to(elementwise(multiply, dz, right), a)
            dy = None if left is None else sum_to(elementwise(multiply, dz, left), b)
            return dx, dy

        return record("multiply", elementwise(multiply, x.data, y.data), (x, y), backward)

    def __pow__(self, exponent: float) -> Tensor:
        """x to the power p, element by element. dx = dy · p · x^(p − 1)."""
        if not isinstance(exponent, (int, float)):
            raise DtypeError(f"** takes a plain number as exponent, got {type(exponent).__name__}")
        x, exponent = self.data, float(exponent)  # np.float64 is a float too, and would promote float32

        def backward(dy: Array) -> Array:
            return dy * exponent * x ** (exponent - 1) if exponent else 0 * dy  # not 0 · ∞ where x is 0

        return record("power", x**exponent, (self,), backward)

    def __matmul__(self, other: Any) -> Tensor:
        """The matrix product x · y. dx = dz · yᵀ, dy = xᵀ · dz."""
        x, y = operands("matmul", self, other)
        a, b = x.data, y.data
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ShapeError(f"@ multiplies (n, k) by (k, m), got {a.shape} and {b.shape}")
        matmul = kernels(a).matmul
        return record("matmul", matmul(a, b, None), (x, y), lambda dz: (matmul(dz, b.T, None), matmul(a.T, dz, None)))

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: Any) -> Tensor:
        return self + -operands("subtract", self, other)[1]

    def __rsub__(self, other: Any) -> Tensor:
        return -self + other

    def __truediv__(self, other: Any) -> Tensor:
        """x / y, element by element, with broadcasting. dx = dz / y, dy = −dz/y · z."""
        x, y = operands("divide", self, other)
        a, b, xp, divisor = x.shape, y.shape, array_module(x.data), y.data
        result = elementwise(xp.divide, x.data, divisor)
        z = result if y.needs_grad else None

        def backward(dz: Array) -> tuple[Array, Array | None]:
            dx = elementwise(xp.divide, dz, divisor)
            return sum_to(dx, a), None if z is None else sum_to(-elementwise(xp.multiply, dx, z), b)

        return record("divide", result, (x, y), backward)

    def __rtruediv__(self, other: Any) -> Tensor:
        return operands("divide", self, other)[1] / self

    __radd__, __rmul__ = __add__, __mul__

    def exp(self) -> Tensor:
        """e to the power of each element."""
        y = array_module(self.data).exp(self.data)
        return record("exp", y, (self,), lambda dy: dy * y)

    def log(self) -> Tensor:
        """The natural logarithm of each element."""
        x = self.data
        return record("log", array_module(x).log(x), (self,), lambda dy: dy / x)

    def sqrt(self) -> Tensor:
        """The square root of each element."""
        y = array_module(self.data).sqrt(self.data)
        return record("sqrt", y, (self,), lambda dy: dy / (2 * y))

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The sum over `axis` (all axes if None)."""
        xp, shape = array_module(self.data), self.shape
        y = self.data.sum(axis=axis, keepdims=keepdims)
        kept = _kept_shape(shape, axis)
        return record("sum", y, (self,), lambda dy: xp.broadcast_to(dy.reshape(kept), shape))

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The mean over `axis` (all axes if None)."""
        if not self.size:
            raise ShapeError(f"mean() of no elements: the tensor has the shape {self.shape}")
        total = self.sum(axis, keepdims)
        return total * (total.size / self.size)

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in C order under another shape; one size may be −1."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        try:
            y = self.data.reshape(shape)
        except ValueError:
            raise ShapeError(f"cannot reshape {self.shape} ({self.size} elements) to {shape}") from None
        before = self.shape
        return record("reshape", y, (self,), lambda dy: dy.reshape(before))

    def flatten(self) -> Tensor:
        """(N, C, H, W) as (N, C·H·W), in the order C, H, W that published linear layers expect."""
        return self.reshape(self.shape[0], self.size // max(1, self.shape[0]))

    def transpose(self, *axes: int) -> Tensor:
        """The axes in the given order; all reversed without arguments."""
        if axes and sorted(a + self.ndim if type(a) is int and a < 0 else a for a in axes) != list(range(self.ndim)):
            raise ShapeError(f"transpose of {self.shape} wants each of its {self.ndim} axes once, got {axes}")
        order = tuple(axis % self.ndim for axis in axes) or tuple(reversed(range(self.ndim)))
        back = tuple(int(i) for i in np.argsort(order))
        return record("transpose", self.data.transpose(order), (self,), lambda dy: dy.transpose(back))

    def __getitem__(self, index: Any) -> Tensor:
        """A part, by ints, slices, ... and None. It shares memory with the whole."""
        for part in index if isinstance(index, tuple) else (index,):
            if not (part is None or part is ... or isinstance(part, (int, slice))):
                raise DtypeError(f"a Tensor is indexed with ints, slices, ... and None, got {type(part).__name__}")
        xp, shape, dtype = array_module(self.data), self.shape, self.dtype

        def backward(dy: Array) -> Array:
            dx = xp.zeros(shape, dtype)
            dx[index] = dy
            return dx

        return record("index", self.data[index], (self,), backward)


def operands(op: str, *values: Any) -> list[Tensor]:
    """The operands of arithmetic as tensors: plain numbers take the dtype and backend of the tensor among them."""
    model = next(value for value in values if isinstance(value, Tensor))
    xp, tensors = array_module(model.data), []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif hasattr(value, "dtype") and np.ndim(value) > 0:
            tensors.append(Tensor(value))
        elif (number := value if hasattr(value, "dtype") else _numbers(value)).ndim == 0 and array_module(number) is np:
            tensors.append(Tensor(xp.full((), number.item(), model.dtype)))  # no upload
        else:
            tensors.append(Tensor(xp.asarray(number, dtype=model.dtype)))
    check_alike(op, *tensors)
    return tensors


def _numbers(data: Any) -> np.ndarray:
    """A number, or nested lists of them, as an array. Raises DtypeError for anything else."""
    try:
        array = np.asarray(data)
    except ValueError:  # rows of unequal length, or tensors among them
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":  # NumPy would make NaN of None, and a number of "1"
        raise DtypeError(f"a Tensor is made of numbers in rows of equal length, got {repr(data)[:80]}")
    return array


def check_alike(op: str, *tensors: Any) -> None:
    """Raise DtypeError where an operand is no tensor or float32 meets float64, and BackendError where host meets
    device: neither is converted behind the user's back."""
    first = tensors[0]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            several = ", ".join(getattr(tensor, "_fields", ()))
            remedy = f"take one of its parts, {several}" if several else "wrap the array in minigrad.Tensor"
            raise DtypeError(f"{op} works on tensors, got {type(tensor).__name__}: {remedy}")
        here, there = array_module(first.data), array_module(tensor.data)
        if here is not there:
            names = f"an array of {here.__name__} {first.shape} and one of {there.__name__} {tensor.shape}"
            raise BackendError(f"{op} got {names}: {MOVE}")
        if tensor.dtype != first.dtype:
            raise DtypeError(
                f"{op} got {first.dtype} {first.shape} and {tensor.dtype} {tensor.shape}: "
                "convert one, as Tensor(x.data.astype('float32')) or model.astype('float64')"
            )


def record(
    op: str, data: Array, inputs: Sequence[Tensor | None], backward: Backward, *, multiply_adds: int = 0
) -> Tensor:
    """Make the result of an op, linked to its inputs: the only door to the graph.

    op             the op's name, for messages
    data           the result
    inputs         the tensors it was computed from (None for one left out, as a bias)
    backward       dy -> one array per input, of the input's shape and dtype, or None where there is no gradient;
                   a single array when there is one input. It may hand on dy itself or a view of it, and must not
                   write into dy.
    multiply_adds  the cost of the forward pass, for `summary`

    When no input needs a gradient, nothing is kept.
    """
    output = Tensor(data)
    if (nodes := _nodes_of(op, inputs)) is not None:
        output.node = Node(op, output.data, nodes, backward)
    if (watch := watcher.get()) is not None:
        watch(op, [output], inputs, output.node, [multiply_adds])
    return output


def record_parts(
    op: str,
    parts: Sequence[Array],
    inputs: Sequence[Tensor | None],
    backward: Callable[[list[Array | None]], Sequence[Array | None]],
    *,
    multiply_adds: Sequence[int] | None = None,
) -> list[Tensor]:
    """As `record`, for an op with several results: its backward gets the gradient of each, None where none came.

    (To be skipped at first reading.) Each result has a node whose only input is the op's node. Going back, a result
    hands its gradient on as a `Part`, with its number, and the op's node collects the parts in a list. Results and op
    stand in topological order like everything else, so that the list is complete when the op's turn comes.
    """
    outputs, whole = [Tensor(part) for part in parts], None
    if (nodes := _nodes_of(op, inputs)) is not None:
        whole = Node(op, parts[0], nodes, backward, parts=len(parts))
        for i, output in enumerate(outputs):
            output.node = Node(op, output.data, (whole,), functools.partial(Part, i))
    if (watch := watcher.get()) is not None:
        watch(op, outputs, inputs, whole, multiply_adds or [0] * len(outputs))
    return outputs


class Part:
    """The gradient of one of an op's several results, on its way to that op."""

    __slots__ = ("gradient", "index")

    def __init__(self, index: int, gradient: Array):
        self.index, self.gradient = index, gradient


def _nodes_of(op: str, inputs: Sequence[Tensor | None]) -> tuple[Node | None, ...] | None:
    """The nodes of those inputs that need a gradient; None if there are none."""
    if not isinstance(inputs, (tuple, list)) or not all(x is None or isinstance(x, Tensor) for x in inputs):
        kinds = [type(x).__name__ for x in inputs] if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise DtypeError(f"record of '{op}' wants its inputs as a tuple of tensors, as (x,), got {kinds}")
    nodes = tuple(_node_of(tensor) if tensor is not None and tensor.needs_grad else None for tensor in inputs)
    return nodes if any(nodes) else None


def _node_of(tensor: Tensor) -> Node:
    if tensor.node is None:  # a leaf, used for the first time
        tensor.node = Node("leaf", tensor.data, (), None)
        tensor.node.owner = weakref.ref(tensor)
    return tensor.node


def _walk(root: Node, gradient: Array) -> None:
    """Send `gradient` from `root` back through the graph, every node after all of its users."""
    gradients: dict[Node, Any] = {root: gradient}  # an array, or a list of them for an op with several results
    # The first gradient that reaches a node is only borrowed, the second makes a sum of our own, from the third on that
    # sum is added to in place. `ours` are the nodes that have one.
    ours: set[Node] = set()
    for node in reversed(_topological(root)):
        dy = gradients.pop(node, None)
        if dy is not None and node.owner is not None and (tensor := node.owner()) is not None:
            tensor.grad = dy if tensor.grad is None else kernels(dy).add(tensor.grad, dy, None)
        backward, node.backward = node.backward, None  # frees what it kept, after this turn of the loop
        if not node.inputs or dy is None:  # a leaf, or an op that had no gradient for its input stands between
            continue
        if backward is None:
            raise GraphError(
                f"backward() reached '{node.name}' a second time, but what it kept was freed after the first: "
                "compute the loss again before every backward(), and sum losses before one common backward()"
            )
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


def _check(node: Node, parent: Node, dx: Array) -> None:
    """Raise GraphError where a backward returned something that is no gradient of its input."""
    if isinstance(dx, Tensor) or not hasattr(dx, "dtype"):
        raise GraphError(
            f"backward of '{node.name}' returned a {type(dx).__name__}, not an array: compute with the .data of tensors"
        )
    if dx.shape != parent.shape or dx.dtype != parent.dtype:
        raise GraphError(
            f"backward of '{node.name}' returned {dx.dtype} {dx.shape} for an input of {parent.dtype} {parent.shape}: "
            "a gradient has its input's shape and dtype"
        )


def _kept_shape(shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape after summing over `axis` with keepdims."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    summed = {i % len(shape) for i in axes} if shape else set()
    return tuple(1 if i in summed else size for i, size in enumerate(shape))
