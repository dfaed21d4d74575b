"""All ops: gradients by finite differences, dtype, layout, inputs. What each means: test_ops_conv.py (with dense) and
so on, a file for each of minigrad/ops. That the kernels behind them compute the right values is shown in
test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from leaves import Function, Make, host

from minigrad import Tensor, gradcheck, no_grad, ops
from minigrad.backend import array_module, to_host
from minigrad.errors import DtypeError, MinigradError, ShapeError
from minigrad.random import Key, integers

# ---- Gradients ----

# input, weight, stride, padding
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], Any, Any]] = [
    ((2, 3, 4, 5), (4, 3, 1, 1), 1, 0),
    ((2, 3, 5, 6), (4, 3, 1, 1), 2, 0),
    ((2, 3, 5, 4), (2, 3, 1, 1), 1, 1),
    ((2, 3, 5, 6), (4, 3, 3, 3), 1, 1),
    ((2, 3, 7, 5), (4, 3, 3, 3), 2, 1),
    ((1, 1, 5, 5), (1, 1, 3, 3), 2, 0),
    ((2, 1, 6, 6), (3, 1, 5, 5), 1, 2),
    ((1, 2, 9, 8), (3, 2, 7, 7), 2, 3),
    ((2, 2, 5, 8), (3, 2, 1, 7), 1, (0, 3)),
    ((2, 2, 8, 5), (3, 2, 7, 1), (2, 1), (3, 0)),
    ((3, 2, 4, 4), (5, 2, 4, 4), 1, 0),
    ((2, 2, 7, 7), (2, 2, 2, 2), 3, 0),
    ((1, 2, 3, 3), (2, 2, 2, 2), 1, 3),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d_gradients(make: Make, case: Any, bias: bool) -> None:
    x, weight, stride, padding = case
    parameters = [make(*weight, name="w")] + [make(weight[0], name="b")] * bias
    gradcheck(lambda *t: ops.conv2d(*t, stride=stride, padding=padding), make(*x), *parameters)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_conv2d(make: Make, groups: int) -> None:
    """The convolution with one large weight that is zero between groups; and its gradients."""
    x, weight, bias = make(2, 4, 6, 5), make(8, 4 // groups, 3, 3, name="w"), make(8, name="b")
    xp = array_module(x.data)
    whole = xp.zeros((8, 4, 3, 3), x.dtype)
    for g in range(groups):
        outputs, inputs = (slice(g * n // groups, (g + 1) * n // groups) for n in (8, 4))
        whole[outputs, inputs] = weight.data[outputs]
    options = {"stride": 2, "padding": 1}
    y = ops.conv2d(x, weight, bias, groups=groups, **options)
    np.testing.assert_allclose(to_host(y.data), to_host(ops.conv2d(x, Tensor(whole), bias, **options).data), atol=1e-12)
    gradcheck(lambda *t: ops.conv2d(*t, groups=groups, **options), x, weight, bias)


@pytest.mark.parametrize(("groups", "message"), [(3, "into 3 groups"), (0, "into 0 groups"), (-2, "into -2 groups")])
def test_groups_divide_the_channels(groups: int, message: str) -> None:
    with pytest.raises(ShapeError, match=f"conv2d cannot cut .* {message}: channels and filters must be multiples"):
        ops.conv2d(host(1, 4, 5, 5), host(8, 2, 3, 3), groups=groups)


POOLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 2, 5), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ((2, 3, 6, 6), {"kernel_size": 2}),
    ((2, 3, 7, 5), {"kernel_size": 3, "stride": 2}),
    ((2, 3, 7, 6), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ((2, 3, 6, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((2, 3, 6, 7), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    ((1, 1, 4, 5), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((2, 2, 7, 8), {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0)}),
    ((2, 2, 7, 7), {"kernel_size": 2, "stride": 3}),
    ((1, 2, 4, 4), {"kernel_size": 4}),
    ((1, 2, 14, 14), {"kernel_size": 5, "stride": 3}),
]


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_max_pool2d_gradients(make: Make, case: Any) -> None:
    """Distinct values: at a tie there is no derivative."""
    gradcheck(lambda x: ops.max_pool2d(x, **case[1]), make(*case[0], distinct=True))


@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_avg_pool2d_gradients(make: Make, case: Any, count_padding: bool) -> None:
    gradcheck(lambda x: ops.avg_pool2d(x, **case[1], count_padding=count_padding), make(*case[0]))


@pytest.mark.parametrize("size", [1, 4, (2, 3), (7, 9), (9, 4)], ids=str)
def test_adaptive_avg_pool2d_gradients(make: Make, size: Any) -> None:
    """Also to more cells than there are pixels."""
    gradcheck(lambda x: ops.adaptive_avg_pool2d(x, size), make(2, 3, 7, 6))


def test_global_avg_pool2d_gradients(make: Make) -> None:
    gradcheck(ops.global_avg_pool2d, make(2, 3, 5, 4))


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 3, 3, 5), (2, 1, 1, 1), (1, 2, 3, 3), (3, 300, 1, 2)], ids=str)
def test_batch_norm_gradients(xp: Any, make: Make, shape: tuple[int, ...], training: bool, relu: bool) -> None:
    mean, var = make(shape[1], name="mean").data, make(shape[1], name="var").data ** 2 + 0.5

    def f(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return ops.batch_norm(x, gamma, beta, mean.copy(), var.copy(), training=training, eps=1e-2, relu=relu)

    gradcheck(f, make(*shape), make(shape[1], name="gamma"), make(shape[1], name="beta"))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("shape", [(2, 7, 3, 2), (2, 1, 3, 2), (1, 3, 2, 2)], ids=str)
def test_local_response_norm_gradients(make: Make, shape: tuple[int, ...], size: int) -> None:
    gradcheck(lambda x: ops.local_response_norm(x, size, alpha=0.7, beta=0.75, k=1.5), make(*shape))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_gradients(xp: Any, make: Make, smoothing: float) -> None:
    labels = xp.asarray(integers(Key(0), 7, 5))
    gradcheck(lambda x: ops.cross_entropy(x, labels, label_smoothing=smoothing), make(5, 7))


OTHERS: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "relu": (ops.relu, [(2, 3, 4, 5)]),
    "relu of a matrix": (ops.relu, [(4, 5)]),
    "tanh": (ops.tanh, [(2, 3, 4, 5)]),
    "sigmoid": (ops.sigmoid, [(2, 3, 4, 5)]),
    "maximum": (ops.maximum, [(4, 5)]),
    "maximum of images": (lambda x: ops.maximum(x, 1), [(2, 3, 4, 5)]),
    "maximum of a vector": (ops.maximum, [(5,)]),
    "dropout of images": (lambda x: ops.dropout(x, 0.4, Key(1)), [(2, 3, 4, 5)]),
    "dropout of a matrix": (lambda x: ops.dropout(x, 0.7, Key(1)), [(4, 9)]),
    "softmax": (ops.softmax, [(3, 5)]),
    "log_softmax": (ops.log_softmax, [(3, 5)]),
    "softmax of one": (ops.softmax, [(3, 1)]),
    "linear": (ops.linear, [(3, 5), (4, 5), (4,)]),
    "linear without bias": (ops.linear, [(3, 5), (4, 5)]),
    "linear of one row": (ops.linear, [(1, 5), (1, 5), (1,)]),
    "concat of images": (lambda *x: ops.concat(x), [(2, 1, 3, 4), (2, 3, 3, 4), (2, 2, 3, 4)]),
    "concat of one": (lambda *x: ops.concat(x), [(2, 1, 3, 4)]),
    "concat of matrices": (lambda *x: ops.concat(x), [(2, 3), (2, 1)]),
    "concat along 0": (lambda *x: ops.concat(x, axis=0), [(2, 3, 2, 2), (1, 3, 2, 2)]),
    "concat along −1": (lambda *x: ops.concat(x, axis=-1), [(2, 3), (2, 3)]),
    "concat along −3": (lambda *x: ops.concat(x, axis=-3), [(2, 1, 3, 4), (2, 2, 3, 4)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_the_others(make: Make, name: str) -> None:
    f, shapes = OTHERS[name]
    gradcheck(f, *(make(*shape, name=str(i)) for i, shape in enumerate(shapes)))


def test_concat_of_the_same_tensor_twice(make: Make) -> None:
    """Both parts of dy meet in one leaf."""
    gradcheck(lambda x: ops.concat([x, x * 2.0, x]), make(2, 3, 2, 2))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_conv2d_with_frozen_inputs(make: Make, frozen: tuple[int, ...]) -> None:
    """What wants no gradient is not computed; the others' must stay in their places."""
    inputs = [make(2, 3, 4, 4), make(4, 3, 3, 3, name="w"), make(4, name="b")]
    for i in frozen:
        inputs[i].requires_grad = False
    gradcheck(lambda *t: ops.conv2d(*t, padding=1), *inputs)


# ---- All ops: dtype, layout, inputs ----

LABELS = np.array([0, 2])
CALLS: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "conv2d": (lambda *t: ops.conv2d(*t, padding=1), [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
    "strided conv2d": (lambda *t: ops.conv2d(*t, stride=2), [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
    "max_pool2d": (lambda x: ops.max_pool2d(x, 3, 2, ceil_mode=True), [(2, 3, 6, 6)]),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, 3, 2, padding=1), [(2, 3, 6, 6)]),
    "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x, 4), [(2, 3, 6, 6)]),
    "relu": (ops.relu, [(2, 3, 4, 4)]),
    "tanh": (ops.tanh, [(2, 3, 4, 4)]),
    "sigmoid": (ops.sigmoid, [(2, 3, 4, 4)]),
    "maximum": (ops.maximum, [(2, 3)]),
    "dropout": (lambda x: ops.dropout(x, 0.5, Key(0)), [(2, 3, 4, 4)]),
    "local_response_norm": (ops.local_response_norm, [(2, 3, 4, 4)]),
    "concat": (lambda *t: ops.concat(t), [(2, 3, 4, 4), (2, 1, 4, 4)]),
    "linear": (ops.linear, [(2, 3), (4, 3), (4,)]),
    "softmax": (ops.softmax, [(2, 3)]),
    "log_softmax": (ops.log_softmax, [(2, 3)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x, LABELS), [(2, 3)]),
}


def on_backend(xp: Any, name: str, make: Make, dtype: str = "float32") -> tuple[list[Tensor], Tensor]:
    f, shapes = CALLS[name]
    inputs = [make(*shape, name=str(i), dtype=dtype) for i, shape in enumerate(shapes)]
    if name == "cross_entropy":
        return inputs, ops.cross_entropy(inputs[0], xp.asarray(LABELS))
    return inputs, f(*inputs)


@pytest.mark.parametrize("name", CALLS)
def test_float32_stays_float32(xp: Any, make: Make, name: str) -> None:
    """The engine refuses a float64 gradient for a float32 input; a float64 result would pass it by."""
    inputs, y = on_backend(xp, name, make)
    y.backward(xp.ones(y.shape, dtype="float32"))
    assert [t.dtype for t in (y, *inputs)] == [np.float32] * (1 + len(inputs))
    assert [t.grad.dtype for t in inputs] == [np.float32] * len(inputs)


@pytest.mark.parametrize("name", CALLS)
def test_inputs_and_upstream_gradients_are_untouched(xp: Any, make: Make, name: str) -> None:
    """An op that saves its input and an op that writes into it cannot both be right."""
    inputs, y = on_backend(xp, name, make)
    upstream = xp.full(y.shape, 2.0, dtype="float32")
    y.backward(upstream)
    for i, (tensor, shape) in enumerate(zip(inputs, CALLS[name][1], strict=True)):
        np.testing.assert_array_equal(tensor.numpy(), make(*shape, name=str(i), dtype="float32").numpy())
    assert (to_host(upstream) == 2).all()


@pytest.mark.parametrize("name", [name for name, (_, shapes) in CALLS.items() if len(shapes[0]) == 4])
def test_images_come_out_channels_last(xp: Any, make: Make, name: str) -> None:
    """In C order, the next op would have to copy them first."""
    _, y = on_backend(xp, name, make)
    assert y.data.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_recorded_in_no_grad(xp: Any, make: Make, name: str) -> None:
    with no_grad():
        _, y = on_backend(xp, name, make)
    assert y.node is None


# ---- Something else than a tensor ----


@pytest.mark.parametrize(
    "op",
    [
        ops.relu,
        ops.tanh,
        ops.sigmoid,
        ops.maximum,
        ops.softmax,
        ops.log_softmax,
        lambda x: ops.dropout(x, 0.5, Key(0)),
        lambda x: ops.max_pool2d(x, 2),
        lambda x: ops.avg_pool2d(x, 2),
        ops.global_avg_pool2d,
        ops.local_response_norm,
        lambda x: ops.cross_entropy(x, np.zeros(2, int)),
        lambda x: ops.conv2d(x, host(1, 1, 1, 1)),
        lambda x: ops.linear(x, host(1, 1)),
    ],
)
def test_an_array_or_a_list_is_no_tensor(op: Any) -> None:
    """An array has a .data too, which is something else."""
    for given in (np.zeros((2, 1, 4, 4), np.float32), [[1.0, 2.0]]):
        with pytest.raises(
            DtypeError, match=rf"works on tensors, got {type(given).__name__}: wrap the array in minigrad"
        ):
            op(given)


def test_several_results_are_no_tensor() -> None:
    """What a network with auxiliary heads returns in training."""

    class Several(NamedTuple):
        aux: Tensor
        logits: Tensor

    with pytest.raises(DtypeError, match="works on tensors, got Several: take one of its parts, aux, logits"):
        ops.cross_entropy(Several(host(2, 3), host(2, 3)), np.zeros(2, int))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "slip",
    [
        pytest.param(lambda: ops.cross_entropy(host(2, 3), [0, 1]), id="labels in a list"),  # type: ignore[arg-type]
        pytest.param(lambda: ops.conv2d(Tensor(np.zeros((0, 1, 5, 5))), host(1, 1, 3, 3)), id="an empty batch"),
        pytest.param(lambda: ops.concat([]), id="nothing to join"),
    ],
)
def test_slips_end_in_a_sentence(slip: Callable[[], Tensor]) -> None:
    """Not in AttributeError, a reshape of size 0, or a StopIteration that ends a caller's loop without a word."""
    with pytest.raises(MinigradError):
        slip()
