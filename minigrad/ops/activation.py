"""Elementwise non-linearities, softmax, dropout."""

from __future__ import annotations

from minigrad.backend import array_module
from minigrad.errors import MinigradError, ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array, elementwise
from minigrad.random import Key
from minigrad.tensor import Tensor, check_alike, record


def relu(x: Tensor) -> Tensor:
    """max(0, x), element by element. Its gradient is 1 where x > 0, and 0 elsewhere.

    Saves y, which the next layer usually keeps anyway.
    """
    check_alike("relu", x)
    xp = array_module(x.data)
    y = elementwise(lambda a, **out: xp.maximum(a, 0, **out), x.data)
    return record("relu", y, (x,), lambda dy: elementwise(xp.multiply, dy, y > 0), kept=())


def tanh(x: Tensor) -> Tensor:
    """(e^x − e^−x) / (e^x + e^−x), element by element. Its gradient is dy · (1 − y²). Saves y."""
    check_alike("tanh", x)
    xp = array_module(x.data)
    y = elementwise(xp.tanh, x.data)
    return record("tanh", y, (x,), lambda dy: elementwise(xp.multiply, dy, 1 - y * y), kept=())


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^−x), element by element. Its gradient is dy · y · (1 − y). Saves y."""
    check_alike("sigmoid", x)
    xp = array_module(x.data)
    # By tanh(x / 2), which does not overflow.
    y = elementwise(lambda a, **out: xp.multiply(0.5, 1 + xp.tanh(0.5 * a), **out), x.data)
    return record("sigmoid", y, (x,), lambda dy: elementwise(xp.multiply, dy, y * (1 - y)), kept=())


def maximum(x: Tensor, axis: int = -1) -> Tensor:
    """The largest element along an axis, which goes. The first of equal ones gets the gradient.

    x        any shape, for example (N, K)
    returns  the shape without the axis, (N,)
    saves    which elements those are, a byte for each of x
    raises   ShapeError if there is no such axis, or nothing along it
    """
    check_alike("maximum", x)
    if not -x.ndim <= axis < x.ndim or x.size == 0:
        raise ShapeError(f"maximum along axis {axis} of a tensor of shape {x.shape}: there is no such axis, or nothing")
    xp, axis = array_module(x.data), axis % x.ndim
    numbers = xp.arange(x.shape[axis]).reshape(-1, *(1,) * (x.ndim - 1 - axis))
    largest = numbers == xp.expand_dims(x.data.argmax(axis=axis), axis)
    y = x.data.max(axis=axis)
    return record("maximum", y, (x,), lambda dy: elementwise(xp.multiply, xp.expand_dims(dy, axis), largest), kept=())


def dropout(x: Tensor, p: float, key: Key, *, rows: Array | None = None) -> Tensor:
    """Drop each value with probability p, and multiply the kept ones by 1/(1 − p).

    key      names the random numbers: the same key, the same mask
    rows     (N,) ints or None: the identity of each row of x, for example its picture's index in the data set;
             the mask of a row then does not depend on its place in the batch
    returns  x's shape
    saves    nothing: the same key drops the same values of dy
    raises   MinigradError if p is not in [0, 1); ShapeError if rows are not as many
    source   Srivastava et al.: Dropout, JMLR 15, 2014
    """
    check_alike("dropout", x)
    check_probability(p)
    if rows is not None and (x.ndim == 0 or len(rows) != len(x)):
        raise ShapeError(
            f"dropout got an input of shape {x.shape} and {len(rows)} rows, wants one for each of its first axis"
        )
    if p == 0 or x.size == 0:
        return x
    k = kernels(x.data)
    return record("dropout", k.dropout(x.data, p, key, rows), (x,), lambda dy: k.dropout(dy, p, key, rows), kept=())


def check_probability(p: float) -> None:
    """Raise MinigradError if dropout cannot drop with probability p."""
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise MinigradError(f"dropout drops with a probability from 0 to below 1, got {p!r}")


def _check_last_axis(op: str, x: Tensor) -> None:
    check_alike(op, x)
    if x.ndim == 0 or x.size == 0:
        raise ShapeError(f"{op} wants (…, K), none of them 0, got {x.shape}")


def softmax(x: Tensor) -> Tensor:
    """e^x over its sum along the last axis: positive numbers that sum to one.

    Its gradient is y · (dy − Σ dy·y). Saves y.
    """
    _check_last_axis("softmax", x)
    xp = array_module(x.data)
    y = xp.exp(x.data - x.data.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return record("softmax", y, (x,), lambda dy: y * (dy - (dy * y).sum(axis=-1, keepdims=True)), kept=())


def log_softmax(x: Tensor) -> Tensor:
    """x − log Σ e^x along the last axis: the logarithm of softmax, without its underflow.

    Its gradient is dy − softmax(x) · Σ dy. Saves y.
    """
    _check_last_axis("log_softmax", x)
    xp = array_module(x.data)
    y = x.data - x.data.max(axis=-1, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=-1, keepdims=True))
    return record("log_softmax", y, (x,), lambda dy: dy - xp.exp(y) * dy.sum(axis=-1, keepdims=True), kept=())
