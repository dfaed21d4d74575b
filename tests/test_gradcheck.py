"""The checker is checked: it catches broken backwards, passes right ones, and leaves everything as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minigrad import Tensor, gradcheck, nn, ops, record
from minigrad.errors import DtypeError, GradientMismatch, GraphError
from minigrad.random import Key, normal, uniform

Function = Callable[..., Tensor]


def leaf(*shape: int, name: str = "x", dtype: str = "float64") -> Tensor:
    return Tensor(normal(Key(5).fold(name, *shape), shape).astype(dtype), requires_grad=True)


# ---- Broken on purpose: each computes the right result, and a plausible wrong gradient ----


def softmax_without_gradient(x: Tensor) -> Tensor:
    """Back-propagating ones finds nothing wrong here: the rows of a softmax sum to one, so their gradient is zero."""
    return record("softmax", ops.softmax(x).data, (x,), lambda dy: np.zeros_like(dy))


def add_without_sum(x: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a broadcast bias is taken from the first row instead of summed over all."""
    return record("add", x.data + bias.data, (x, bias), lambda dy: (dy, dy[0]))


def linear_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """A square weight hides that dx was multiplied by the transpose: every shape fits."""
    w = weight.data
    return record("linear", x.data @ w.T, (x, weight), lambda dy: (dy @ w.T, dy.T @ x.data))


def mean_without_division(x: Tensor) -> Tensor:
    shape = x.shape
    return record("mean", x.data.mean(), (x,), lambda dy: np.broadcast_to(dy, shape))


def dropout_without_scale(x: Tensor) -> Tensor:
    """The forward pass multiplies what it keeps by 1/(1 − p), the backward pass forgets to."""
    mask = uniform(Key(0), x.shape) >= 0.5
    return record("dropout", x.data * mask * 2, (x,), lambda dy: dy * mask)


def relu_of_the_wrong_side(x: Tensor) -> Tensor:
    negative = x.data < 0
    return record("relu", np.maximum(x.data, 0), (x,), lambda dy: dy * negative)


def batch_mean_as_a_constant(x: Tensor) -> Tensor:
    """x − mean(x), as if the mean were a constant: the classic mistake in a batch norm."""
    return record("centre", x.data - x.data.mean(0), (x,), lambda dy: dy)


def off_by_a_millionth(x: Tensor) -> Tensor:
    return record("scale", x.data * 2, (x,), lambda dy: dy * (2 + 1e-5))


BROKEN: list[tuple[Function, list[tuple[int, ...]]]] = [
    (softmax_without_gradient, [(3, 4)]),
    (add_without_sum, [(3, 4), (4,)]),
    (linear_transposed, [(3, 4), (4, 4)]),
    (mean_without_division, [(3, 4)]),
    (dropout_without_scale, [(3, 4)]),
    (relu_of_the_wrong_side, [(3, 4)]),
    (batch_mean_as_a_constant, [(3, 4)]),
    (off_by_a_millionth, [(3, 4)]),
]


@pytest.mark.parametrize(("f", "shapes"), [pytest.param(f, shapes, id=f.__name__) for f, shapes in BROKEN])
@pytest.mark.parametrize("seed", range(3))
def test_a_broken_backward_is_caught(f: Function, shapes: Any, seed: int) -> None:
    """Whatever the random direction: a check that is right by luck is none."""
    with pytest.raises(GradientMismatch, match="finite differences give"):
        gradcheck(f, *(leaf(*shape, name=str(i)) for i, shape in enumerate(shapes)), seed=seed)


@pytest.mark.parametrize(("wrong", "f"), [(1, add_without_sum), (0, linear_transposed)])
def test_the_wrong_input_is_named(wrong: int, f: Function) -> None:
    """With four inputs, 'something differs' would leave a day of searching."""
    shapes = [(4, 4), (4,)] if f is add_without_sum else [(4, 4), (4, 4)]
    with pytest.raises(GradientMismatch, match=f"in input {wrong}, "):
        gradcheck(f, *(leaf(*shape, name=str(i)) for i, shape in enumerate(shapes)))


def test_a_broken_layer_deep_in_a_model_is_caught() -> None:
    """Through the parameters alone, where no input wants a gradient."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return softmax_without_gradient(x)

    model = nn.Sequential(nn.Linear(4, 4), Broken(), nn.Linear(4, 2)).astype("float64")
    with pytest.raises(GradientMismatch, match="the 4 parameters together"):
        gradcheck(model, Tensor(leaf(3, 4).data), parameters=model.parameters())


def test_a_gradient_that_is_missing_is_caught() -> None:
    """None from a backward says 'no gradient', and here there is one."""
    with pytest.raises(GradientMismatch, match="in input 1"):
        gradcheck(lambda x, y: record("mul", x.data * y.data, (x, y), lambda dy: (dy * y.data, None)), leaf(3), leaf(3))


@pytest.mark.parametrize("steps", [(1e-5, 1e-6, 1e-7), (1e-8, 1e-9), (1e-9,)], ids=str)
@pytest.mark.parametrize("error", [1.1e-3, -1.0], ids=["a thousandth", "all of it"])
def test_rounding_excuses_no_difference(error: float, steps: tuple[float, ...]) -> None:
    """Large values beside a small gradient: what rounding could explain at a small step is not taken for agreement."""

    def f(x: Tensor) -> Tensor:
        return record("shift", x.data * 0.01 + 1000.0, (x,), lambda dy: dy * (0.01 * (1 + error)))

    with pytest.raises(GradientMismatch, match="finite differences give"):
        gradcheck(f, leaf(50), tolerance=1e-5, steps=steps)


def test_the_right_gradient_beside_large_values_passes() -> None:
    """And what is returned is no more than the tolerance."""
    right = gradcheck(lambda x: x * 0.01 + 1000.0, leaf(50), tolerance=1e-5)
    assert 0 < right <= 1e-5


# ---- Right, and passed ----


@pytest.mark.parametrize("seed", range(3))
def test_a_right_backward_passes(seed: int) -> None:
    assert gradcheck(ops.softmax, leaf(3, 4), seed=seed) < 1e-6


def test_several_outputs_are_checked_together() -> None:
    gradcheck(lambda x: (x * 2.0, x.exp()), leaf(3))
    with pytest.raises(GradientMismatch):
        gradcheck(lambda x: (x * 2.0, softmax_without_gradient(x)), leaf(3, 2))


def test_a_true_gradient_of_zero_passes() -> None:
    """A bias in front of batch norm: the mean takes it away, and both sides of the check are rounding noise."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).astype("float64")
    bias = next(parameter for name, parameter in model.named_parameters() if name == "0.bias")
    gradcheck(model, Tensor(leaf(2, 2, 5, 5).data), parameters=[bias])


def test_a_result_of_zero_passes() -> None:
    """ReLU of negative numbers: nothing to divide by."""
    assert gradcheck(ops.relu, Tensor(np.full(3, -1.0), requires_grad=True)) == 0.0


def test_inputs_that_want_no_gradient_are_left_out() -> None:
    constant = Tensor(np.ones(3))
    gradcheck(lambda x, c: x * c, leaf(3), constant)
    assert constant.grad is None


def test_a_kink_does_not_spoil_the_check() -> None:
    """One value lies 4e-6 from ReLU's corner: the largest step crosses it, the smaller ones do not."""
    x = normal(Key(0), 1000)
    x[0] = 4e-6
    gradcheck(ops.relu, Tensor(x, requires_grad=True))


def test_it_works_on_every_backend(xp: Any) -> None:
    gradcheck(lambda x: (x * x).sum(), Tensor(xp.asarray(normal(Key(0), (2, 3))), requires_grad=True))


# ---- Refused, and explained ----


def test_float32_is_refused() -> None:
    """Its rounding, 1e-7, over a step of 1e-6 would hide any mistake below ten percent."""
    with pytest.raises(DtypeError, match=r"needs float64, input 0 is float32: convert with \.astype\('float64'\)"):
        gradcheck(ops.relu, leaf(3, dtype="float32"))


def test_float32_parameters_are_refused() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(DtypeError, match="needs float64, the 2 parameters together is float32"):
        gradcheck(layer, leaf(2, 3), parameters=layer.parameters())


def test_randomness_is_explained() -> None:
    """A new dropout mask in every evaluation looks like a wrong gradient."""
    calls = itertools.count()
    with pytest.raises(GraphError, match=r"two results for the same inputs: fix its randomness, as model\.set_key"):
        gradcheck(lambda x: ops.dropout(x, 0.5, Key(next(calls))), leaf(20))


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(GraphError, match="nothing to check"):
        gradcheck(ops.relu, Tensor(np.ones(3)))


def test_nan_does_not_pass() -> None:
    """Every comparison with NaN is false: written the other way round, the check would accept it."""
    with pytest.raises(GradientMismatch):
        gradcheck(lambda x: record("nan", x.data * 2, (x,), lambda dy: dy * np.nan), leaf(3))


# ---- No trace ----


@pytest.mark.parametrize("f", [ops.softmax, softmax_without_gradient], ids=["right", "wrong"])
def test_inputs_are_restored(f: Function) -> None:
    """The same array with the same values, after a failure, too."""
    x = leaf(3, 4)
    data, values = x.data, x.data.copy()
    if f is ops.softmax:
        gradcheck(f, x)
    else:
        with pytest.raises(GradientMismatch):
            gradcheck(f, x)
    assert x.data is data
    np.testing.assert_array_equal(x.data, values)


def test_an_old_gradient_does_not_count() -> None:
    """What an earlier backward left in .grad would be added to the one that is checked."""
    x = leaf(3)
    x.grad = np.ones(3)
    gradcheck(ops.softmax, x)


def test_the_same_seed_checks_the_same() -> None:
    x = leaf(3, 4)
    assert gradcheck(ops.softmax, x, seed=1) == gradcheck(ops.softmax, x, seed=1)


def test_arrays_are_refused() -> None:
    with pytest.raises(DtypeError, match="gradcheck works on tensors, got ndarray: wrap"):
        gradcheck(ops.relu, np.zeros(3))
    with pytest.raises(DtypeError, match="gradcheck: f must return a tensor or several, got ndarray"):
        gradcheck(lambda x: x.data, leaf(3))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2).astype("float64")
    model.bias.requires_grad = False
    gradcheck(model, leaf(4, 3), parameters=model.parameters())


def test_gradients_are_as_before() -> None:
    """A random upstream gradient's must not be added to the user's next one."""
    x, model = leaf(4, 3), nn.Linear(3, 2).astype("float64")
    x.grad = mine = np.full(x.shape, 7.0)
    gradcheck(model, x, parameters=model.parameters())
    assert x.grad is mine
    assert [parameter.grad for parameter in model.parameters()] == [None, None]
