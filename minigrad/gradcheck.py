"""Is a backward right? Compare it with finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from minigrad.backend import array_module
from minigrad.errors import DtypeError, GradientMismatch, GraphError
from minigrad.graph import no_grad
from minigrad.layout import Array
from minigrad.random import Key, normal
from minigrad.tensor import Tensor, check_alike

STEPS = (1e-5, 1e-6, 1e-7)
Function = Callable[..., Tensor | Sequence[Tensor]]


def gradcheck(
    f: Function,
    *inputs: Tensor,
    parameters: Iterable[Tensor] = (),
    seed: int = 0,
    tolerance: float = 1e-6,
    steps: Sequence[float] = STEPS,
) -> float:
    """Compare the gradients of f(*inputs) with finite differences; raise GradientMismatch where they differ.

        Σ_i ⟨d_i, ∂L/∂x_i⟩  =  (L(x + ε·d) − L(x − ε·d)) / 2ε,      L = ⟨g, f(x)⟩

    with a random direction d and a random upstream gradient g: back-propagating ones would pass a softmax whose
    backward returns zero. Every input is checked by itself, so that a message names the wrong one, and all
    `parameters` together. A network has kinks (ReLU, max-pool), so it passes if one of the `steps` ε agrees; a wrong
    backward fails all of them. A deep network is smooth over 1e-8 or 1e-9 only.

    f           tensors in, a tensor or several out; deterministic (hand dropout a key)
    inputs      float64 tensors; those with requires_grad are checked
    parameters  further float64 leaves that f depends on, as model.parameters(); the frozen ones are left out
    returns     the largest relative difference found, at most `tolerance`
    raises      GradientMismatch, also where rounding hides a gradient that is small beside f(x): larger steps see more;
                DtypeError for float32, whose rounding would hide errors

    The `.grad` of what is checked is as before afterwards; other leaves that f depends on collect theirs, and what f
    itself changes stays so: running statistics, unless in evaluation.
    """
    for x in inputs:
        check_alike("gradcheck", x)
    groups = [(f"input {i}", [x]) for i, x in enumerate(inputs) if x.requires_grad]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if parameters:
        groups.append((f"the {len(parameters)} parameters together", parameters))
    if not groups:
        raise GraphError("gradcheck has nothing to check: no input with requires_grad=True and no parameters")
    for name, leaves in groups:
        for leaf in leaves:
            if leaf.dtype != np.float64:
                raise DtypeError(f"gradcheck needs float64, {name} is {leaf.dtype}: convert with .astype('float64')")
    loss = _Loss(f, inputs, Key(seed))
    analytic = _gradients(loss.tensor, [leaf for _, leaves in groups for leaf in leaves])
    here, again = loss.value(), loss.value()
    if here != again and not (np.isnan(here) and np.isnan(again)):
        raise GraphError(
            "gradcheck: f gives two results for the same inputs: fix its randomness, as model.set_key(Key(0)) does"
        )
    return max(_Group(name, leaves, loss, Key(seed)).check(analytic, tolerance, steps) for name, leaves in groups)


class _Loss:
    """L = ⟨g, f(x)⟩, with a random upstream gradient g.

    tensor   L at the inputs as they are, with its graph
    size     Σ |g·f(x)|: the rounding error of L is proportional to it
    """

    def __init__(self, f: Function, inputs: Sequence[Tensor], key: Key):
        self.f, self.inputs = f, inputs
        outputs = self._outputs()
        self.upstream = [_random(key.fold("upstream", i), y) for i, y in enumerate(outputs)]
        terms = [y * Tensor(g) for y, g in zip(outputs, self.upstream, strict=True)]
        self.tensor = sum((term.sum() for term in terms), start=Tensor(0 * self.upstream[0].sum()))
        self.size = sum(float(abs(term.data).sum()) for term in terms)

    def value(self) -> float:
        """L at the inputs as they are now."""
        with no_grad():
            return sum(float((y.data * g).sum()) for y, g in zip(self._outputs(), self.upstream, strict=True))

    def _outputs(self) -> list[Tensor]:
        result = self.f(*self.inputs)
        results: list[Any] = list(result) if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(y, Tensor) for y in results):
            raise DtypeError(f"gradcheck: f must return a tensor or several, got {type(result).__name__}")
        return results


class _Group:
    """Leaves that are checked together, each along a random direction."""

    def __init__(self, name: str, leaves: list[Tensor], loss: _Loss, key: Key):
        self.name, self.leaves, self.loss = name, leaves, loss
        self.directions = [_random(key.fold("direction", name, i), leaf) for i, leaf in enumerate(leaves)]

    def check(self, analytic: dict[int, Array | None], tolerance: float, steps: Sequence[float]) -> float:
        """The relative difference at the first step that agrees. Raises GradientMismatch if none does."""
        gradients = [analytic[id(leaf)] for leaf in self.leaves]
        pairs = zip(gradients, self.directions, strict=True)
        predicted = sum(float((g * d).sum()) for g, d in pairs if g is not None)
        found = []
        for step in steps:
            measured = (self._shifted(step) - self._shifted(-step)) / (2 * step)
            difference, size = abs(measured - predicted), max(abs(measured), abs(predicted))
            if difference <= tolerance * size:
                return difference / size if difference else 0.0
            # A gradient of zero is measured as the rounding of L. This excuses no other difference.
            if abs(predicted) <= 1e-12 * self.loss.size and abs(measured) <= min(1e-15 / step, 1e-9) * self.loss.size:
                return 0.0
            found.append(f"{measured:.9g} (ε={step:g})")
        raise GradientMismatch(
            f"gradcheck: backward gives {predicted:.9g} for a random direction in {self.name}, finite differences give "
            + ", ".join(found)
        )

    def _shifted(self, step: float) -> float:
        """L with every leaf moved by step · direction."""
        before = [leaf.data for leaf in self.leaves]
        try:
            for leaf, direction in zip(self.leaves, self.directions, strict=True):
                leaf.data = leaf.data + step * direction
            return self.loss.value()
        finally:
            for leaf, data in zip(self.leaves, before, strict=True):
                leaf.data = data


def _gradients(loss: Tensor, leaves: list[Tensor]) -> dict[int, Array | None]:
    """d(loss)/d(leaf) by id of the leaf; their own .grad is put back."""
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return {id(leaf): leaf.grad for leaf in leaves}
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient


def _random(key: Key, like: Tensor) -> Array:
    xp = array_module(like.data)
    values = xp.empty_like(like.data)
    values[...] = xp.asarray(normal(key, like.shape))
    return values
