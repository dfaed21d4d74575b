"""Module: something with parameters that is called with tensors.

There is no registry. A module finds its parameters, buffers and children by walking its own attributes, and the lists,
tuples and dicts among them, in the order in which they were set; in this project that is the order of the paper, of
the state dict and of the optimizer. A layer that is used twice is one layer, with one set of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from minigrad import backend
from minigrad.backend import array_module, to_host
from minigrad.errors import DtypeError, MinigradError, ShapeError, StateError, differences
from minigrad.layout import Array, empty_images, moved
from minigrad.nn.recompute import recomputed
from minigrad.random import Key
from minigrad.tensor import Tensor


class Parameter(Tensor):
    """A leaf tensor that is trained. Weights of rank 4 are kept channels-last: see layout."""

    __slots__ = ()

    def __init__(self, data: Array):
        super().__init__(data, requires_grad=True)


class CallObserver(Protocol):
    """What `watch` is to a module: told when a call begins and ends: of one, or of several that run as one op."""

    def enter(self, *modules: Module) -> None: ...
    def leave(self, *modules: Module) -> None: ...


_PLAIN = frozenset({bool, int, float, str, type(None)})  # the types of most attributes

observer: ContextVar[CallObserver | None] = ContextVar("observer", default=None)
_outline: ContextVar[bool] = ContextVar("_outline", default=False)


class Module:
    """Base of all layers and models. Subclasses set attributes in `__init__` and define `forward`."""

    training: bool = True
    frozen: bool = False  # not to be trained: see freeze
    recompute: bool = False  # keep only the input until backward, and run forward again then: see nn.recompute

    def forward(self, *inputs: Any) -> Any:
        """What the module computes; subclasses define it. Call the module itself, not this: see `__call__`."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def __call__(self, *inputs: Any) -> Any:
        """Run `forward`. An exception on its way out learns the path of the layer in which it was raised."""
        with self.called():
            return recomputed(self, *inputs) if self.recompute else self.forward(*inputs)

    @contextmanager
    def called(self, *others: Module) -> Iterator[None]:
        """What surrounds a call: whoever observes is told of it, and exceptions learn where they were raised.

        others   the modules that run as one op with this one: see `together`
        """
        watching = observer.get()
        if watching is not None:
            watching.enter(self, *others)
        try:
            yield
        except Exception as error:
            self._locate(error)
            raise
        finally:
            if watching is not None:
                watching.leave(self, *others)

    def _locate(self, error: Exception) -> None:
        """Every module that an error passes through looks up, in its own terms, the path of the innermost one."""
        origin = error.__dict__.setdefault("raised_in", self)
        path = next((path for path, module in self.named_modules() if module is origin), None)
        if path is None:  # held where a walk does not enter, as in a closure: keep what is known
            return
        if isinstance(error, MinigradError):
            error.layer_path = path
        elif path:
            notes = error.__dict__.setdefault("__notes__", [])
            notes[:] = [note for note in notes if not note.startswith("in layer ")] + [f"in layer {path}"]

    def attributes(self) -> dict[str, Any]:
        """What is set on this module, its mode included, to be put back by `vars(module).update`."""
        return {"training": self.training, **vars(self)}  # the class's, until train or eval has been called

    # --- walking the tree

    def members(self, *kinds: type) -> list[tuple[str, Any]]:
        """(name, value) of each attribute of these kinds, and of those in lists, tuples and dicts, as "layers.0"."""
        found: list[tuple[str, Any]] = []
        _look_into(vars(self), "", kinds, found, ())
        return found

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of each direct child, in the order of definition: twice if it has two names."""
        return iter(self.members(Module))

    def _walk(self, path: str, *kinds: type) -> Iterator[tuple[str, Module, list[tuple[str, Any]]]]:
        """(path, module, its members of these kinds) of this module and all below it, each once."""
        seen: set[int] = set()
        stack: list[tuple[str, Module]] = [(path, self)]
        while stack:
            path, module = stack.pop()
            if id(module) not in seen:
                seen.add(id(module))
                members = module.members(Module, *kinds)
                yield path, module, members
                stack += [(f"{path}.{n}" if path else n, m) for n, m in reversed(members) if isinstance(m, Module)]

    def named_modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module (path "") and all below it, in the order of definition, each once: a layer that
        is used twice has its first path, and one that keeps its parent makes no circle."""
        return ((path, module) for path, module, _ in self._walk(path))

    def _named(self, kind: type, but_not: type | tuple[()] = ()) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for path, _, members in self._walk("", kind):
            for name, value in members:
                if isinstance(value, kind) and not isinstance(value, but_not) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def _state(self) -> dict[str, Tensor]:
        """path -> tensor of all that belongs to the state."""
        named = list(self._named(Tensor))
        if len(state := dict(named)) < len(named):
            twice = next(name for name, tensor in named if state[name] is not tensor)
            raise StateError(f"two tensors of this {type(self).__name__} have the name {twice!r}: rename an attribute")
        return state

    def _find(self, path: str) -> Tensor | None:
        """The tensor of this path, the second path of a shared layer too; None if there is none."""
        for name, child in self.children():
            if path.startswith(f"{name}.") and (found := child._find(path[len(name) + 1 :])) is not None:
                return found
        return dict(self.members(Tensor)).get(path)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, parameter) of all that is trained, in the order of definition."""
        return self._named(Parameter)

    def parameters(self) -> Iterator[Parameter]:
        """All that is trained, in the order of definition."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(path, tensor) of what belongs to the state but is not trained, as running statistics."""
        return self._named(Tensor, but_not=Parameter)

    # --- modes

    def train(self, mode: bool = True) -> Module:
        """Training mode (or evaluation) for this module and all below that are not frozen: see batch norm, dropout."""
        for _, module in self.named_modules():
            module.training = mode and not module.frozen
        return self

    def eval(self) -> Module:
        """Evaluation mode: batch norm uses its running statistics, dropout does nothing."""
        return self.train(False)

    def freeze(self) -> Module:
        """Train this module and all below no more: its parameters get no gradient, and it stays in evaluation mode, so
        that running statistics stand still. To fine-tune: model.freeze(), then put a fresh classifier in its place.
        """
        for _, module in self.named_modules():
            module.frozen = True
        for parameter in self.parameters():
            parameter.requires_grad = False
            parameter.grad = None
        return self.eval()

    def set_key(self, key: Key, rows: Array | None = None) -> None:
        """Hand every dropout layer below its random numbers for this step: key.fold(path of the layer).

        key    names the step, for example Key(seed).fold("step", 17)
        rows   (N,) or None: which picture of the data set each row of the batch is
        """
        if not isinstance(key, Key):
            raise DtypeError(f"set_key wants a key, as minigrad.random.Key(seed).fold(step), got {type(key).__name__}")
        for path, module in self.named_modules():
            module.take_key(key.fold(path), rows)

    def take_key(self, key: Key, rows: Array | None) -> None:
        """Layers that draw random numbers override this."""

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    # --- state

    def state_dict(self) -> dict[str, np.ndarray]:
        """path -> host array (a copy) of every parameter and buffer. What is shared has its first path alone."""
        return {path: np.array(to_host(tensor.data), order="C") for path, tensor in self._state().items()}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """path -> shape of every parameter and buffer; of an `outline` too."""
        return {path: tensor.shape for path, tensor in self._state().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Overwrite every parameter and buffer, in place. What is shared may have any of its paths, or several.
        Those of an `outline` get memory of their own.

        Raises StateError that lists all missing, unexpected, misshapen or conflicting entries; nothing is changed then.
        """
        if not isinstance(state, Mapping):
            kind = type(state).__name__
            raise StateError(f"load_state_dict wants names with arrays, as state_dict() returns them, got {kind}")
        mine = self._state()
        found = {name: mine[name] if name in mine else self._find(str(name)) for name in state}
        names = {id(tensor): name for name, tensor in found.items() if tensor is not None}  # of a shared one the last
        misshapen = [
            f"{name} has {tuple(np.shape(state[name]))}, the model wants {tensor.shape}"
            for name, tensor in found.items()
            if tensor is not None and np.shape(state[name]) != tensor.shape
        ]
        problems = {
            "missing": [name for name, tensor in mine.items() if id(tensor) not in names],
            "unexpected": [name for name, tensor in found.items() if tensor is None],
            "of another shape": misshapen,
        }
        self._refuse(problems)
        try:
            arrays = {name: np.asarray(state[name], dtype=t.dtype) for name, t in found.items() if t is not None}
        except (TypeError, ValueError) as error:
            raise StateError(f"these weights hold something that is not a number: {error}") from None
        last = {name: names[id(tensor)] for name, tensor in found.items()}
        conflicts = [
            f"{name} and {other} are one tensor, but differ"
            for name, other in last.items()
            if name != other and not np.array_equal(arrays[name], arrays[other], equal_nan=True)
        ]
        self._refuse({"in conflict": conflicts})
        for tensor in mine.values():
            if isinstance(tensor.data, np.ndarray) and not tensor.data.flags.writeable:  # of an outline
                tensor.data = empty_images(backend.default_module(), tensor.shape, tensor.dtype)
            tensor.data[...] = array_module(tensor.data).asarray(arrays[names[id(tensor)]])
            tensor.changed("load_state_dict()")

    def _refuse(self, problems: Mapping[str, list[str]]) -> None:
        if any(problems.values()):
            raise StateError(f"these weights are not those of this {type(self).__name__}: {differences(problems)}")

    def to(self, name: str) -> Module:
        """Move every parameter and buffer to a backend, "numpy" or "cupy"; gradients are forgotten. Returns the module.

        Where new arrays are made, a batch for example, is another matter: `minigrad.set_backend`. An optimizer is
        built after this; one that was built before says so, and its state goes on in a new one (`load_state_dict`).
        Raises BackendError if the backend cannot be used here.
        """
        xp = backend.module_named(name)
        for _, tensor in self._named(Tensor):
            tensor.data = moved(tensor.data, xp)
            tensor.grad, tensor.node = None, None
        return self

    def astype(self, dtype: Any) -> Module:
        """Convert every parameter and buffer to float32 or float64."""
        if dtype not in ("float32", "float64", np.float32, np.float64):
            raise DtypeError(f"a module's numbers are float32 or float64, got {dtype!r}")
        for _, tensor in self._named(Tensor):
            tensor.data = tensor.data.astype(dtype)
            tensor.grad, tensor.node = None, None
        return self

    def __repr__(self) -> str:
        return self._text(set())

    def _text(self, seen: set[int]) -> str:
        """The options and the children; of a module that has been shown already the type alone."""
        if id(self) in seen:
            return f"{type(self).__name__}(as above)"
        seen.add(id(self))
        lines = [f"{name}: {child._text(seen)}".replace("\n", "\n  ") for name, child in self.children()]
        body = "".join(f"\n  {line}" for line in lines)
        return f"{type(self).__name__}({self.extra_repr()}{body}{chr(10) if body else ''})"

    def extra_repr(self) -> str:
        """The options of this layer, as they stand in its repr."""
        return ""


def _look_into(
    container: Any, path: str, kinds: tuple[type, ...], found: list[tuple[str, Any]], around: tuple[Any, ...]
) -> None:
    """Add (path, value) of all of these kinds that a container holds, at any depth."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if type(value) in _PLAIN:
            continue
        if isinstance(value, kinds):
            found.append((f"{path}{key}", value))
        elif isinstance(value, (list, tuple, dict)) and not any(value is outer for outer in around):  # no circle
            _look_into(value, f"{path}{key}.", kinds, found, (*around, value))


@contextmanager
def outline() -> Iterator[None]:
    """Within the block layers are built as outlines: their arrays have shapes, but no memory, and nothing is drawn.

    `load_state_dict` compares the shapes, then gives the arrays memory and numbers. A module whose weights lie in a
    file is built like this: drawing weights would be lost time, and no memory is taken on the word of the file.
    """
    token = _outline.set(True)
    try:
        yield
    finally:
        _outline.reset(token)


def outlined() -> bool:
    """Whether layers are built as outlines here: whoever fills their arrays leaves it out then."""
    return _outline.get()


def new_array(shape: tuple[int, ...], fill: float | None = None) -> Array:
    """A float32 array for a layer on the default backend, channels-last if of rank 4; uninitialised without `fill`."""
    if outlined():
        try:
            return np.broadcast_to(np.float32(0), shape)
        except ValueError:
            raise ShapeError(f"an array of shape {shape} has more numbers than memory has addresses") from None
    array = empty_images(backend.default_module(), shape, np.dtype(np.float32))
    if fill is not None:
        array[...] = fill
    return array


def new_parameter(shape: tuple[int, ...], fill: float | None = None) -> Parameter:
    """A parameter on `new_array`."""
    return Parameter(new_array(shape, fill))
