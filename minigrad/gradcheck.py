"""Is a backward right? Compare it with finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from minigrad.backend import array_module, to_host
from minigrad.errors import DtypeError, GradientMismatch, GraphError
from minigrad.random import Key, normal
from minigrad.tensor import Tensor, check_alike, no_grad

STEPS = (1e-5, 1e-6, 1e-7)


def gradcheck(
    f: Callable[..., Tensor | Sequence[Tensor]],
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
    returns     the largest relative difference found
    raises      GradientMismatch; DtypeError for float32, whose rounding would hide errors

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
    outputs = _outputs(f, inputs)
    upstream = [_random(Key(seed).fold("upstream", i), y) for i, y in enumerate(outputs)]
    loss = sum(
        ((y * Tensor(g)).sum() for y, g in zip(outputs, upstream, strict=True)), start=Tensor(0 * upstream[0].sum())
    )
    analytic = _gradients(loss, [leaf for _, leaves in groups for leaf in leaves])

    def value() -> tuple[float, float]:
        """L, and the size of the terms it is summed from (what its rounding error is proportional to)."""
        with no_grad():
            terms = [to_host(y.data * g) for y, g in zip(_outputs(f, inputs), upstream, strict=True)]
        return float(sum(t.sum() for t in terms)), float(sum(np.abs(t).sum() for t in terms))

    (here, scale), (again, _) = value(), value()
    if here != again and not (np.isnan(here) and np.isnan(again)):
        raise GraphError(
            "gradcheck: f gives two results for the same inputs: fix its randomness, as model.set_key(Key(0)) does"
        )
    return max(_check(name, leaves, analytic, value, scale, Key(seed), tolerance, steps) for name, leaves in groups)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> dict[int, Any]:
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


def _check(name, leaves, analytic, value, scale, key, tolerance, steps) -> float:  # type: ignore[no-untyped-def]
    directions = [_random(key.fold("direction", name, i), leaf) for i, leaf in enumerate(leaves)]
    grads = [analytic[id(leaf)] for leaf in leaves]
    predicted = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True) if g is not None)
    found = []
    for step in steps:
        measured = (_shifted(leaves, directions, step, value) - _shifted(leaves, directions, -step, value)) / (2 * step)
        noise = 1e-15 * scale / step  # a gradient of zero is measured as rounding of L
        difference, size = abs(measured - predicted), max(abs(measured), abs(predicted))
        if difference <= tolerance * size + noise:
            return difference / max(size, noise) if difference else 0.0
        found.append(measured)
    raise GradientMismatch(
        f"gradcheck: backward gives {predicted:.9g} for a random direction in {name}, finite differences give "
        + ", ".join(f"{m:.9g} (ε={step:g})" for m, step in zip(found, steps, strict=True))
    )


def _shifted(leaves, directions, step, value) -> float:  # type: ignore[no-untyped-def]
    """L with every leaf moved by step · direction."""
    before = [leaf.data for leaf in leaves]
    try:
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.data = leaf.data + step * direction
        return value()[0]
    finally:
        for leaf, data in zip(leaves, before, strict=True):
            leaf.data = data


def _outputs(f, inputs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    result = f(*inputs)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if not all(isinstance(y, Tensor) for y in results):
        raise DtypeError(f"gradcheck: f must return a tensor or several, got {type(result).__name__}")
    return results


def _random(key: Key, like: Tensor):  # type: ignore[no-untyped-def]
    xp = array_module(like.data)
    values = xp.empty_like(like.data)
    values[...] = xp.asarray(normal(key, like.shape))
    return values
