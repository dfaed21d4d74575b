"""Tensor, record, backward: a complete small autograd. Read this file first.

Every op computes an array and calls `record` with a function that sends a gradient back. `record` links the
result to its inputs; the links form a graph, and `backward` walks it from the loss to the parameters: see graph.py.

An op keeps the arrays that its backward reads, not copies of them. Where minigrad changes values in place (an
optimizer's step, load_state_dict, running statistics), the tensor counts it, and a backward that needs the earlier
values raises GraphError instead of giving a wrong gradient. Changes of your own are not seen: an array that you refill
between forward and backward, as a buffer for batches, gives the gradient of neither. Refill it after backward, or call
`tensor.changed("…")`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from minigrad import backend
from minigrad.backend import MOVE, array_module
from minigrad.errors import BackendError, DtypeError, GraphError, ShapeError
from minigrad.graph import Changes, Node, Part, recording, walk, watcher
from minigrad.kernels import kernels
from minigrad.layout import Array, elementwise, sum_to

Backward = Callable[[Array], Array | Sequence[Array | None] | None]


class Tensor:
    """An array with a gradient.

    data           a float32 or float64 array of either backend, or numbers (made float32 on the current backend)
    requires_grad  True for a leaf whose gradient `backward` shall leave in `.grad`
    """

    __slots__ = ("__weakref__", "changes", "data", "grad", "node", "requires_grad")
    __array_ufunc__ = None  # numpy_array * tensor is refused by NumPy and comes to our __rmul__

    def __array_function__(self, *_: Any, **__: Any) -> NoReturn:
        # Without this np.sum would call our sum, with arguments of its own.
        raise DtypeError("a NumPy function got a Tensor: hand it the array, x.numpy()")

    __array__ = __array_function__  # without this NumPy would make an array of one Tensor for each number

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
        self.changes = Changes()

    def __getstate__(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        # What copy and pickle take along. A copy is a leaf of its own: it has no part in the original's graph.
        return getattr(self, "__dict__", None), {
            "data": self.data,
            "grad": self.grad,
            "requires_grad": self.requires_grad,
            "node": None,
            "changes": self.changes,
        }

    shape = property(lambda self: self.data.shape, doc="Sizes of the axes.")
    dtype = property(lambda self: self.data.dtype, doc="float32 or float64.")
    ndim = property(lambda self: self.data.ndim, doc="The number of axes.")
    size = property(lambda self: self.data.size, doc="The number of elements.")
    T = property(lambda self: self.transpose(), doc="All axes reversed.")

    @property
    def version(self) -> int:
        """How often the values have been changed in place by minigrad, or as `changed` was told; views share it.

        What was computed from a tensor still holds while its `.data` is the same array and its version the same.
        """
        return self.changes.count

    def changed(self, by: str) -> None:
        """Count a change of the values in place. A backward that needs the earlier ones then names it and raises."""
        self.changes.count += 1
        self.changes.by = by

    @property
    def needs_grad(self) -> bool:
        """Whether an op on this tensor has to be recorded."""
        return recording.get() and (self.requires_grad or (self.node is not None and self.node.inputs != ()))

    def __repr__(self) -> str:
        mark = f", from {self.node.name}" if self.node and self.node.backward else ""
        values = repr(self.data) if self.size <= 100 else f"{self.dtype} {self.shape}"
        return f"Tensor({values}{', requires_grad=True' if self.requires_grad else mark})"

    def __len__(self) -> int:
        return len(self.data)

    def item(self) -> float:
        """The value of a tensor with one element, as a Python float. On a GPU this waits for it."""
        if self.size != 1:
            raise ShapeError(f"item() needs a tensor with one element, got shape {self.shape}")
        return float(self.data.reshape(()))

    __float__ = item

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def numpy(self) -> np.ndarray:
        """The data as a host array (shared with the tensor when it is on the host already)."""
        return backend.to_host(self.data)

    def detach(self) -> Tensor:
        """The same data, cut off from the graph."""
        result = Tensor(self.data)
        result.changes = self.changes
        return result

    def _view(self, op: str, data: Array, backward: Backward) -> Tensor:
        """Record the result of an op that shares memory with this tensor, and so the count of its changes."""
        result = record(op, data, (self,), backward, kept=())
        result.changes = self.changes
        return result

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
        walk(self.node, gradient)

    # --- arithmetic: each op is its formula, and how a gradient goes back through it

    def __add__(self, other: Any) -> Tensor:
        """x + y, with broadcasting. The gradient goes on to both as it is."""
        x, y = operands("add", self, other)
        a, b = x.shape, y.shape
        result = elementwise(array_module(x.data).add, x.data, y.data)
        return record("add", result, (x, y), lambda dz: (sum_to(dz, a), sum_to(dz, b)), kept=())

    def __mul__(self, other: Any) -> Tensor:
        """x · y, element by element, with broadcasting. dx = dz · y, dy = dz · x."""
        x, y = operands("multiply", self, other)
        a, b, multiply = x.shape, y.shape, array_module(x.data).multiply
        # Each factor is kept for the gradient of the other: of a tensor times a plain number, the number alone.
        left, right = x.data if y.needs_grad else None, y.data if x.needs_grad else None
        kept = (None if left is None else x, None if right is None else y)

        def backward(dz: Array) -> tuple[Array | None, Array | None]:
            dx = None if right is None else sum_to(elementwise(multiply, dz, right), a)
            dy = None if left is None else sum_to(elementwise(multiply, dz, left), b)
            return dx, dy

        return record("multiply", elementwise(multiply, x.data, y.data), (x, y), backward, kept=kept)

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

        return record("divide", result, (x, y), backward, kept=(y,))

    def __rtruediv__(self, other: Any) -> Tensor:
        return operands("divide", self, other)[1] / self

    __radd__, __rmul__ = __add__, __mul__

    def exp(self) -> Tensor:
        """e to the power of each element."""
        y = array_module(self.data).exp(self.data)
        return record("exp", y, (self,), lambda dy: dy * y, kept=())

    def log(self) -> Tensor:
        """The natural logarithm of each element."""
        x = self.data
        return record("log", array_module(x).log(x), (self,), lambda dy: dy / x)

    def sqrt(self) -> Tensor:
        """The square root of each element."""
        y = array_module(self.data).sqrt(self.data)
        return record("sqrt", y, (self,), lambda dy: dy / (2 * y), kept=())

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """The sum over `axis` (all axes if None)."""
        xp, shape = array_module(self.data), self.shape
        y = self.data.sum(axis=axis, keepdims=keepdims)
        summed = _kept_shape(shape, axis)
        return record("sum", y, (self,), lambda dy: xp.broadcast_to(dy.reshape(summed), shape), kept=())

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
        return self._view("reshape", y, lambda dy: dy.reshape(before))

    def flatten(self) -> Tensor:
        """(N, C, H, W) as (N, C·H·W), in the order C, H, W that published linear layers expect."""
        return self.reshape(self.shape[0], self.size // max(1, self.shape[0]))

    def transpose(self, *axes: int) -> Tensor:
        """The axes in the given order; all reversed without arguments."""
        if axes and sorted(a + self.ndim if type(a) is int and a < 0 else a for a in axes) != list(range(self.ndim)):
            raise ShapeError(f"transpose of {self.shape} wants each of its {self.ndim} axes once, got {axes}")
        order = tuple(axis % self.ndim for axis in axes) or tuple(reversed(range(self.ndim)))
        back = tuple(int(i) for i in np.argsort(order))
        return self._view("transpose", self.data.transpose(order), lambda dy: dy.transpose(back))

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

        return self._view("index", self.data[index], backward)


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
    op: str,
    data: Array,
    inputs: Sequence[Tensor | None],
    backward: Backward,
    *,
    kept: Sequence[Tensor | None] | None = None,
    multiply_adds: int = 0,
) -> Tensor:
    """Make the result of an op, linked to its inputs: the only door to the graph.

    op             the op's name, for messages
    data           the result
    inputs         the tensors it was computed from (None for one left out, as a bias)
    backward       dy -> one array per input, of the input's shape and dtype, or None where there is no gradient;
                   a single array when there is one input. It may hand on dy itself or a view of it, and must not
                   write into dy.
    kept           the tensors whose values backward reads; all inputs if None. When one of them has been changed in
                   place before backward runs, it is refused.
    multiply_adds  the cost of the forward pass, for `summary`

    When no input needs a gradient, nothing is kept.
    """
    output = Tensor(data)
    if (nodes := _nodes_of(op, inputs)) is not None:
        output.node = Node(op, output.data, nodes, backward, inputs if kept is None else kept)
    if (watch := watcher.get()) is not None:
        watch(op, [output], inputs, output.node, [multiply_adds])
    return output


def record_parts(
    op: str,
    parts: Sequence[Array],
    inputs: Sequence[Tensor | None],
    backward: Callable[[list[Array | None]], Sequence[Array | None]],
    *,
    kept: Sequence[Tensor | None] | None = None,
    multiply_adds: Sequence[int] | None = None,
) -> list[Tensor]:
    """As `record`, for an op with several results: its backward gets the gradient of each, None where none came.

    (To be skipped at first reading.) Each result has a node whose only input is the op's node. Going back, a result
    hands its gradient on as a `Part`, with its number, and the op's node collects the parts in a list. Results and op
    stand in topological order like everything else, so that the list is complete when the op's turn comes.
    """
    outputs, whole = [Tensor(part) for part in parts], None
    if (nodes := _nodes_of(op, inputs)) is not None:
        whole = Node(op, parts[0], nodes, backward, inputs if kept is None else kept, len(parts))
        for i, output in enumerate(outputs):
            output.node = Node(op, output.data, (whole,), functools.partial(Part, i))
    if (watch := watcher.get()) is not None:
        watch(op, outputs, inputs, whole, multiply_adds or [0] * len(outputs))
    return outputs


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


def _kept_shape(shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape after summing over `axis` with keepdims."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    summed = {i % len(shape) for i in axes} if shape else set()
    return tuple(1 if i in summed else size for i, size in enumerate(shape))
