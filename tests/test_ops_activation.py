"""Dropout and softmax: meanings, and every sentence they refuse with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from leaves import Function, Make, host

from minigrad import Tensor, ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError, ShapeError
from minigrad.random import Key

# ---- Dropout ----


def test_the_same_key_drops_the_same() -> None:
    x = host(10, 20)
    np.testing.assert_array_equal(ops.dropout(x, 0.5, Key(1)).data, ops.dropout(x, 0.5, Key(1)).data)
    assert (ops.dropout(x, 0.5, Key(1)).data != ops.dropout(x, 0.5, Key(2)).data).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_dropout_drops_p_and_scales_the_rest(xp: Any, p: float) -> None:
    """Scaled by 1/(1 − p), the mean stays; evaluation then needs no change."""
    y = ops.dropout(Tensor(xp.ones((200, 500))), p, Key(0)).numpy()
    np.testing.assert_allclose(y[y != 0], 1 / (1 - p), rtol=1e-15)
    assert abs((y == 0).mean() - p) < 5 * math.sqrt(p * (1 - p) / y.size)


def test_backward_of_dropout_uses_the_same_mask(make: Make) -> None:
    x = make(5, 20)
    y = ops.dropout(x, 0.5, Key(0))
    y.backward(x.data)
    np.testing.assert_array_equal(to_host(x.grad), y.numpy())


def test_p_of_zero_drops_nothing() -> None:
    x = host(3, 4)
    assert ops.dropout(x, 0, Key(0)) is x


@pytest.mark.parametrize("shape", [(6, 30), (6, 4, 3, 2)], ids=str)
def test_a_rows_mask_does_not_depend_on_its_place(xp: Any, shape: tuple[int, ...]) -> None:
    """The picture at index 17 of the data set is masked alike in any batch, on any number of workers."""
    ids, order = np.array([3, 17, 4, 8, 2, 0]), np.array([5, 1, 0, 3])
    x = Tensor(xp.ones(shape))
    whole = ops.dropout(x, 0.5, Key(0), rows=xp.asarray(ids)).numpy()
    part = ops.dropout(Tensor(x.data[:4]), 0.5, Key(0), rows=xp.asarray(ids[order])).numpy()
    np.testing.assert_array_equal(part, whole[order])
    assert (whole[0] != whole[1]).any()


def test_every_backend_drops_the_same(xp: Any) -> None:
    here = ops.dropout(Tensor(xp.ones((3, 5))), 0.5, Key(0)).numpy()
    np.testing.assert_array_equal(here, ops.dropout(Tensor(np.ones((3, 5))), 0.5, Key(0)).data)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_a_probability_is_below_one(p: float) -> None:
    """At 1 the kept values would be multiplied by infinity."""
    with pytest.raises(MinigradError, match=r"dropout drops with a probability from 0 to below 1, got"):
        ops.dropout(host(3), p, Key(0))


def test_dropout_knows_as_many_rows_as_there_are() -> None:
    with pytest.raises(ShapeError, match=r"dropout got an input of shape \(4, 5\) and 3 rows, wants one for each"):
        ops.dropout(host(4, 5), 0.5, Key(0), rows=np.arange(3))


# ---- Softmax ----


@pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax])
def test_softmax_survives_large_logits(op: Function) -> None:
    """e^1000 overflows: the largest logit is subtracted first."""
    y = op(Tensor(np.array([[1000.0, 1000.0], [-1000.0, 0.0]])))
    assert np.isfinite(y.data).all()


def test_log_softmax_does_not_underflow() -> None:
    assert ops.log_softmax(Tensor(np.array([[0.0, -1000.0]]))).data[0, 1] == -1000.0


def test_softmax_sums_to_one(make: Make) -> None:
    y = ops.softmax(make(4, 7)).numpy()
    np.testing.assert_allclose(y.sum(-1), 1)
    np.testing.assert_allclose(np.log(y), ops.log_softmax(make(4, 7)).numpy(), rtol=1e-12)


@pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax])
@pytest.mark.parametrize("shape", [(), (2, 0), (0, 3)], ids=str)
def test_softmax_of_nothing(op: Function, shape: Any) -> None:
    with pytest.raises(ShapeError, match=r"softmax wants \(…, K\), none of them 0, got"):
        op(host(*shape))


# ---- tanh, sigmoid, maximum ----


def test_tanh_and_sigmoid_have_their_values_and_do_not_overflow(xp: Any) -> None:
    """By Python's own functions; and their limits, far out."""
    values = [-30.0, -1.0, 0.0, 0.5, 3.0]
    x = Tensor(xp.asarray(values))
    np.testing.assert_allclose(ops.tanh(x).numpy(), [math.tanh(v) for v in values], rtol=1e-14)
    np.testing.assert_allclose(ops.sigmoid(x).numpy(), [1 / (1 + math.exp(-v)) for v in values], rtol=1e-12, atol=1e-16)
    with np.errstate(all="raise"):
        far = Tensor(xp.asarray(np.array([-1e4, 1e4], "float32")))
        np.testing.assert_array_equal(ops.tanh(far).numpy(), [-1, 1])
        np.testing.assert_array_equal(ops.sigmoid(far).numpy(), [0, 1])


def test_the_first_of_equal_maxima_gets_the_gradient(xp: Any) -> None:
    x = Tensor(xp.asarray([[1.0, 7.0, 7.0], [2.0, -1.0, 0.0]]), requires_grad=True)
    y = ops.maximum(x)
    assert y.numpy().tolist() == [7, 2]
    y.backward(xp.asarray([10.0, 20.0]))
    assert to_host(x.grad).tolist() == [[0, 10, 0], [20, 0, 0]]
    for axis in (2, -3):
        with pytest.raises(ShapeError, match=rf"maximum along axis {axis} of a tensor of shape \(2, 3\): there is no"):
            ops.maximum(x, axis)
