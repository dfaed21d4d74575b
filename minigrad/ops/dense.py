"""The fully connected layer, and joining branches."""

from __future__ import annotations

from collections.abc import Sequence

from minigrad.backend import array_module
from minigrad.errors import ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.tensor import Tensor, check_alike, record


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias. dx = dy · weight, dweight = dyᵀ · x, dbias = Σ dy over the rows.

    x        (N, C)
    weight   (K, C)
    bias     (K,) or None
    returns  (N, K)
    saves    x, weight
    costs    N·C·K multiply-adds, twice that again in backward
    raises   ShapeError if the features differ, or x is empty
    """
    check_alike("linear", x, weight, *([] if bias is None else [bias]))
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        c = weight.shape[1] if weight.ndim == 2 else "C"
        raise ShapeError(f"linear got an input of shape {x.shape}, weight {weight.shape} wants (N, {c})")
    if x.size == 0:
        raise ShapeError(f"linear got an empty input {x.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"linear got a bias of shape {bias.shape} for {weight.shape[0]} outputs")
    # What backward needs is captured now, as arrays: it must not see what the tensors hold by then.
    a, w, needs_dx, with_bias = x.data, weight.data, x.needs_grad, bias is not None
    matmul = kernels(a).matmul
    y = matmul(a, w.T, None)
    if bias is not None:
        y += bias.data

    def backward(dy: Array) -> tuple[Array | None, ...]:
        dx = matmul(dy, w, None) if needs_dx else None
        return dx, matmul(dy.T, a, None), dy.sum(axis=0) if with_bias else None

    kept = (x, weight if needs_dx else None)
    return record("linear", y, (x, weight, bias), backward, kept=kept, multiply_adds=y.size * x.shape[1])


def concat(tensors: Sequence[Tensor], axis: int = 1) -> Tensor:
    """Join tensors along an axis; along axis 1 of images, the columns of their pixel matrices side by side.

    tensors  of equal shapes but for `axis`
    saves    nothing: backward hands each input its part of dy, as a view
    raises   ShapeError if the other sizes differ, or there is no such axis
    """
    if not tensors:
        raise ShapeError("concat got no tensors")
    check_alike("concat", *tensors)
    shapes, ndim = [tensor.shape for tensor in tensors], tensors[0].ndim
    if not -ndim <= axis < ndim:
        raise ShapeError(f"concat along axis {axis} of tensors that have {ndim}: {', '.join(map(str, shapes))}")
    axis %= ndim
    if len({(len(s), *s[:axis], *s[axis + 1 :]) for s in shapes}) > 1:
        raise ShapeError(f"concat along axis {axis} got shapes that differ elsewhere: {', '.join(map(str, shapes))}")
    arrays = [tensor.data for tensor in tensors]
    if axis == 1 and len(shapes[0]) == 4:
        y = kernels(arrays[0]).concat(arrays)
    else:
        y = array_module(arrays[0]).concatenate(arrays, axis=axis)
    ends = [sum(s[axis] for s in shapes[: i + 1]) for i in range(len(shapes))]
    before = (slice(None),) * axis

    def backward(dy: Array) -> list[Array]:
        return [dy[(*before, slice(end - s[axis], end))] for s, end in zip(shapes, ends, strict=True)]

    return record("concat", y, tensors, backward, kept=())
