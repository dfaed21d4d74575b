"""A tensor's own ops: their values and gradients, dtypes, and what a tensor shows of itself."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
from test_tensor import Function, leaf, positive

from minigrad import Tensor, gradcheck, ops
from minigrad.backend import to_host
from minigrad.errors import BackendError, DtypeError, ShapeError
from minigrad.random import Key, normal

# ---- Arithmetic ----

PAIRS = [
    ((), ()),
    ((3,), ()),
    ((1,), (3,)),
    ((2, 3), (3,)),
    ((2, 3), (2, 1)),
    ((1, 3), (2, 1)),
    ((2, 1, 3), (4, 1)),
    ((2, 3, 4, 5), (2, 3, 4, 5)),
    ((2, 3, 4, 5), (3, 1, 1)),
    ((2, 3, 4, 5), (1, 3, 1, 1)),
    ((2, 3, 1, 5), (1, 1, 4, 1)),
    ((2, 3, 4, 5), ()),
]
OPERATORS = {"+": operator.add, "−": operator.sub, "×": operator.mul, "÷": operator.truediv}


@pytest.mark.parametrize("sign", OPERATORS)
@pytest.mark.parametrize("shapes", PAIRS, ids=str)
def test_arithmetic_broadcasts(xp: Any, shapes: tuple[Any, Any], sign: str) -> None:
    """Values are NumPy's; gradients are summed over the axes along which an operand was repeated."""
    f = OPERATORS[sign]
    for one, other in (shapes, shapes[::-1]):
        x, y = positive(xp, *one), positive(xp, *other, name="y")
        np.testing.assert_allclose(f(x, y).numpy(), f(x.numpy(), y.numpy()), rtol=1e-14)
        gradcheck(f, x, y)


UNARY: dict[str, Function] = {
    "−x": lambda x: -x,
    "x + 2": lambda x: x + 2,
    "2 − x": lambda x: 2 - x,
    "x · 2": lambda x: x * 2,
    "2 / x": lambda x: 2 / x,
    "x / 2": lambda x: x / 2,
    "x²": lambda x: x**2,
    "x^−1.5": lambda x: x**-1.5,
    "x^0": lambda x: x**0 + x,
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "sqrt": lambda x: x.sqrt(),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "sum(0)": lambda x: x.sum(0),
    "sum(−1)": lambda x: x.sum(-1),
    "sum((0, −2))": lambda x: x.sum((0, -2)),
    "sum(1, keepdims)": lambda x: x.sum(1, keepdims=True),
    "mean(−2)": lambda x: x.mean(-2),
    "mean((1, 2), keepdims)": lambda x: x.mean((1, 2), keepdims=True),
    "sum(())": lambda x: x.sum(()),
    "reshape": lambda x: x.reshape(4, -1),
    "reshape(tuple)": lambda x: x.reshape((2, 12)),
    "flatten": lambda x: x.flatten(),
    "transpose": lambda x: x.transpose(),
    "T": lambda x: x.T,
    "transpose(2, 0, 1)": lambda x: x.transpose(2, 0, 1),
    "transpose(0, −1, 1)": lambda x: x.transpose(0, -1, 1),
    "transpose(−1, 0, 1)": lambda x: x.transpose(-1, 0, 1),
    "x[1]": lambda x: x[1],
    "x[−1, ..., 2]": lambda x: x[-1, ..., 2],
    "x[:, ::2, None]": lambda x: x[:, ::2, None],
    "x[:, ::−1]": lambda x: x[:, ::-1],
    "x[0, 0, 0]": lambda x: x[0, 0, 0],
}


@pytest.mark.parametrize("name", UNARY)
def test_gradients_of_one_operand(xp: Any, name: str) -> None:
    gradcheck(UNARY[name], positive(xp, 2, 3, 4))


@pytest.mark.parametrize("name", ["sum", "mean", "T"])
def test_a_single_number_has_no_axes(xp: Any, name: str) -> None:
    gradcheck(UNARY[name], positive(xp))


def test_images_keep_channels_last_through_arithmetic(xp: Any) -> None:
    """CuPy allocates results in C order: an activation would be copied at the next convolution."""
    x = Tensor(xp.zeros((2, 4, 5, 3)).transpose(0, 3, 1, 2))
    for y in (x + x, x * x, x - 1.0, x + Tensor(xp.zeros((3, 1, 1)))):
        assert y.data.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("name", ["sum(−1)", "mean((1, 2), keepdims)", "transpose(2, 0, 1)", "x[−1, ..., 2]", "x^−1.5"])
def test_values_of_one_operand(name: str) -> None:
    """The methods are NumPy's own, and so are their values."""
    x = np.abs(normal(Key(0), (2, 3, 4)))
    np.testing.assert_allclose(UNARY[name](Tensor(x)).data, UNARY[name](x), rtol=1e-15)  # type: ignore[arg-type]


def test_matmul(xp: Any) -> None:
    a, b = positive(xp, 2, 3), positive(xp, 3, 4, name="b")
    np.testing.assert_allclose((a @ b).numpy(), a.numpy() @ b.numpy())
    gradcheck(operator.matmul, a, b)


def test_sharing_one_operand_on_both_sides(xp: Any) -> None:
    """Both gradients of the op meet in one leaf."""
    gradcheck(lambda x: x @ x, positive(xp, 3, 3))
    gradcheck(lambda x: x / x + x * x, positive(xp, 3))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((3,), (3, 2)), ((2, 2, 3), (3, 2))], ids=str)
def test_matmul_says_what_it_takes(shapes: Any) -> None:
    with pytest.raises(ShapeError, match=r"@ multiplies \(n, k\) by \(k, m\), got"):
        leaf(*shapes[0]) @ leaf(*shapes[1])


def test_reshape_says_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"cannot reshape \(2, 3\) \(6 elements\) to \(4, 2\)"):
        leaf(2, 3).reshape(4, 2)


@pytest.mark.parametrize("index", [[0, 1], np.array([0, 1]), np.array([True, False]), "a", 1.5], ids=str)
def test_only_plain_indices(index: Any) -> None:
    """Backward writes dy into the indexed part: with repeated indices it would lose all but the last."""
    with pytest.raises(DtypeError, match="indexed with ints, slices"):
        leaf(2, 3)[index]


def test_powers_are_plain_numbers() -> None:
    with pytest.raises(DtypeError, match="plain number as exponent, got Tensor"):
        leaf(3) ** leaf(3)  # type: ignore[operator]


# ---- Dtypes ----

FLOAT32: dict[str, Function] = {
    "x + 1": lambda x: x + 1,
    "1.5 + x": lambda x: 1.5 + x,
    "x · np.float32": lambda x: x * np.float32(2),
    "x · np.float64": lambda x: x * np.float64(2),
    "np.float64 · x": lambda x: np.float64(2) * x,
    "np.float64 − x": lambda x: np.float64(2) - x,
    "np.float64 / x": lambda x: np.float64(2) / x,
    "x / np.int64": lambda x: x / np.int64(3),
    "0-d array · x": lambda x: np.array(2.0) * x,
    "x / 3": lambda x: x / 3,
    "3 / x": lambda x: 3 / x,
    "x²": lambda x: x**2,
    "x^½": lambda x: x**0.5,
    "x^np.float64": lambda x: x ** np.float64(2),
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "sqrt": lambda x: x.sqrt(),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "mean(0)": lambda x: x.mean(0),
    "x @ xᵀ": lambda x: x @ x.T,
    "softmax": ops.softmax,
    "log_softmax": ops.log_softmax,
    "dropout": lambda x: ops.dropout(x, 0.3, Key(0)),
}


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_stays_float32(xp: Any, name: str) -> None:
    """A float64 that slips in doubles the memory of everything after it: NumPy 2 promotes without a word."""
    x = positive(xp, 2, 3, dtype="float32")
    y = FLOAT32[name](x)
    assert y.dtype == np.float32
    y.backward(xp.ones(y.shape, dtype="float32"))
    assert x.grad.dtype == np.float32


def test_numbers_become_float32() -> None:
    assert Tensor([1, 2]).dtype == np.float32
    assert Tensor(1.5).dtype == np.float32


@pytest.mark.parametrize("sign", OPERATORS)
def test_float32_and_float64_do_not_mix(sign: str) -> None:
    message = r"got float32 \(2, 3\) and float64 \(3,\): convert"
    with pytest.raises(DtypeError, match=message):
        OPERATORS[sign](leaf(2, 3, dtype="float32"), leaf(3))


def test_an_array_of_another_dtype_is_no_operand() -> None:
    """A float64 array is not a plain number: converting it quietly would hide a mistake in the data."""
    with pytest.raises(DtypeError, match=r"got float32 .* and float64"):
        leaf(3, dtype="float32") * np.ones(3)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "complex64"])
def test_tensors_hold_floats(dtype: str) -> None:
    with pytest.raises(DtypeError, match=f"holds float32 or float64, got {dtype}: convert with"):
        Tensor(np.ones(3, dtype))


def test_a_tensor_is_not_wrapped_twice() -> None:
    with pytest.raises(DtypeError, match="got a Tensor: use it as it is"):
        Tensor(leaf(3))


def test_arrays_on_either_side() -> None:
    """`array * tensor` would otherwise be an object array of tensors."""
    x, array = leaf(3), np.full(3, 2.0)
    for y in (array * x, x * array):
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.numpy(), 2 * x.numpy())


def test_host_and_device_do_not_mix(xp: Any) -> None:
    if xp is np:
        pytest.skip("needs two backends")
    words = r"multiply got an array of .*: move one, with model\.to, or minigrad\.backend\.asarray"
    with pytest.raises(BackendError, match=words):
        positive(xp, 3) * leaf(3)


# ---- Looking at a tensor ----


def test_item_is_a_python_float(xp: Any) -> None:
    assert type(Tensor(xp.full((1, 1), 2.5)).item()) is float
    with pytest.raises(ShapeError, match=r"one element, got shape \(2,\)"):
        Tensor(xp.zeros(2)).item()


def test_numpy_shares_host_memory() -> None:
    x = leaf(3)
    assert x.numpy() is x.data


def test_repr_tells_leaf_and_op() -> None:
    x = Tensor(1.0, requires_grad=True)
    assert "requires_grad=True" in repr(x)
    assert "from multiply" in repr(x * 2.0)


def test_a_sum_over_many_is_right(xp: Any) -> None:
    x = positive(xp, 7, 5)
    np.testing.assert_allclose(to_host(x.mean(0).data), x.numpy().mean(0))


def test_division_is_rounded_once(xp: Any) -> None:
    """x · (1/y) is rounded twice: 399 of these numbers would be another than NumPy's, and x/x less than 1."""
    x = np.arange(1, 2000, dtype=np.float32)
    np.testing.assert_array_equal((Tensor(xp.asarray(x)) / 10.0).numpy(), x / np.float32(10))
    np.testing.assert_array_equal((1.0 / Tensor(xp.asarray(x))).numpy(), np.float32(1) / x)


def test_dividing_by_small_numbers_does_not_overflow(xp: Any) -> None:
    """1/y² would, in float32, from 5e-20 on."""
    x, y = (Tensor(xp.asarray(np.float32([v])), requires_grad=True) for v in (1e-25, 1e-20))
    (x / y).sum().backward()
    np.testing.assert_allclose(to_host(x.grad), 1e20, rtol=1e-6)
    np.testing.assert_allclose(to_host(y.grad), -1e15, rtol=1e-6)
    tiny = Tensor(xp.asarray(np.float32([1e-39])))
    assert (tiny / tiny).item() == 1.0


def test_the_zeroth_power_of_zero_has_no_gradient(xp: Any) -> None:
    x = Tensor(xp.asarray([0.0, 2.0]), requires_grad=True)
    (x**0).sum().backward()
    assert to_host(x.grad).tolist() == [0, 0]
