"""The ops: gradients by finite differences, meanings against a line of NumPy, and every sentence they refuse with.

That the kernels behind them compute the right values is shown in test_kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from minigrad import Tensor, gradcheck, no_grad, ops
from minigrad.backend import array_module, to_host
from minigrad.errors import BackendError, DtypeError, MinigradError, ShapeError
from minigrad.random import Key, integers, normal, permutation

Function = Callable[..., Tensor]
Make = Callable[..., Tensor]


@pytest.fixture
def make(xp: Any) -> Make:
    """Leaves on the backend of the test, float64 and channels-last unless asked otherwise."""

    def leaf(*shape: int, name: str = "x", dtype: str = "float64", distinct: bool = False) -> Tensor:
        key = Key(7).fold(name, *shape)
        values = permutation(key, math.prod(shape)).reshape(shape) / 10 - 1 if distinct else normal(key, shape)
        array = xp.asarray(values.astype(dtype))
        if len(shape) == 4:
            array = xp.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        return Tensor(array, requires_grad=True)

    return leaf


def host(*shape: int, name: str = "x") -> Tensor:
    return Tensor(normal(Key(7).fold(name, *shape), shape), requires_grad=True)


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


# ---- Convolution, linear ----


def test_linear_is_a_product_and_a_bias() -> None:
    x, w, b = host(3, 5), host(4, 5, name="w"), host(4, name="b")
    np.testing.assert_allclose(ops.linear(x, w, b).data, x.data @ w.data.T + b.data, rtol=1e-13)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [(2, 3, 5, 5), (4, 2, 3, 3)],
            r"conv2d got .* \(2, 3, 5, 5\), weight \(4, 2, 3, 3\) wants \(N, 2, H, W\)$",
        ),
        ([(3, 5, 5), (4, 3, 3, 3)], r"conv2d got an input of shape \(3, 5, 5\), weight .* wants \(N, 3, H, W\)$"),
        ([(2, 5, 5, 3), (4, 3, 3, 3)], r"\(2, 5, 5, 3\), .* move the channels with x\.transpose\(0, 3, 1, 2\)"),
        ([(2, 3, 5, 5), (4, 3, 3, 3), (3,)], r"conv2d got a bias of shape \(3,\) for 4 filters"),
        ([(2, 3, 5, 5), (4, 3, 3, 3), (4, 1)], r"conv2d got a bias of shape \(4, 1\) for 4 filters"),
        ([(2, 3, 2, 5), (4, 3, 3, 3)], r"a 3×3 window does not fit the 2×5 input with padding \(0, 0\)"),
    ],
)
def test_conv2d_says_what_does_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.conv2d(*(host(*shape) for shape in shapes))


@pytest.mark.parametrize("options", [{"stride": 0}, {"padding": -1}, {"stride": (1, 0)}], ids=str)
def test_conv2d_says_which_options_are_out_of_range(options: Any) -> None:
    with pytest.raises(ShapeError, match=r"^(stride must be at least 1|padding must be at least 0), got \("):
        ops.conv2d(host(1, 1, 5, 5), host(1, 1, 3, 3), **options)


@pytest.mark.parametrize("stride", ["2", 1.5, (1, 2, 3), (1,), (1.0, 1)], ids=str)
def test_a_stride_is_a_number_or_a_pair(stride: Any) -> None:
    with pytest.raises(ShapeError, match=r"^stride must be an int or a tuple of two, \(height, width\), got"):
        ops.conv2d(host(1, 1, 5, 5), host(1, 1, 3, 3), stride=stride)


def test_conv2d_does_not_mix_dtypes() -> None:
    with pytest.raises(DtypeError, match=r"conv2d got float64 .* and float32"):
        ops.conv2d(host(1, 1, 5, 5), Tensor(np.ones((1, 1, 3, 3), "float32")))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (4, 5)], r"linear got an input of shape \(2, 3\), weight \(4, 5\) wants \(N, 5\)"),
        ([(2, 3, 1, 1), (4, 3)], r"linear got an input of shape \(2, 3, 1, 1\)"),
        ([(2, 3), (4, 3), (3,)], r"linear got a bias of shape \(3,\) for 4 outputs"),
        ([(0, 3), (4, 3)], r"linear got an empty input \(0, 3\)"),
        ([(2, 3), ()], r"linear got an input of shape \(2, 3\), weight \(\) wants \(N, C\)"),
    ],
)
def test_linear_says_what_does_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.linear(*(host(*shape) for shape in shapes))


def test_concat_says_what_differs() -> None:
    with pytest.raises(ShapeError, match=r"concat along axis 1 got shapes that differ elsewhere: \(2, 1, 3, 4\), "):
        ops.concat([host(2, 1, 3, 4), host(2, 1, 3, 5)])
    with pytest.raises(ShapeError, match=r"concat along axis 1 got shapes that differ elsewhere: \(2, 3\), \(2,\)"):
        ops.concat([host(2, 3), host(2)])


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), 2), ((2, 3), 5), ((2, 3), -3), ((), 0)], ids=str)
def test_concat_along_an_axis_that_is_not_there(shape: Any, axis: int) -> None:
    """Counted modulo the number of axes, it would join along another."""
    with pytest.raises(ShapeError, match=f"concat along axis {axis} of tensors that have {len(shape)}: "):
        ops.concat([host(*shape), host(*shape)], axis=axis)


def test_concat_of_nothing_with_something() -> None:
    parts = [host(2, 0, 3, 4), host(2, 2, 3, 4)]
    np.testing.assert_array_equal(ops.concat(parts).data, parts[1].data)
    assert ops.concat([host(0, 1, 3, 4), host(0, 2, 3, 4)]).shape == (0, 3, 3, 4)


# ---- Pooling ----


@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.avg_pool2d])
def test_pools_say_what_does_not_fit(pool: Function) -> None:
    name = pool.__name__
    with pytest.raises(ShapeError, match=rf"{name}: padding must be at most half of the kernel \(3, 3\), got \(2, 2\)"):
        pool(host(1, 1, 5, 5), 3, padding=2)
    with pytest.raises(ShapeError, match="a 7×7 window does not fit the 5×6 input"):
        pool(host(1, 1, 5, 6), 7)
    with pytest.raises(ShapeError, match=rf"{name} wants \(N, C, H, W\), none of them 0, got \(5, 5\)"):
        pool(host(5, 5), 3)


def test_the_stride_of_a_pool_is_its_kernel() -> None:
    assert ops.max_pool2d(host(1, 1, 6, 9), (2, 3)).shape == (1, 1, 3, 3)


def test_a_fully_padded_edge_never_wins() -> None:
    """Zeros as padding would beat every negative value."""
    y = ops.max_pool2d(Tensor(np.full((1, 1, 4, 4), -5.0)), 3, 2, padding=1)
    assert (y.data == -5).all()


def test_a_tie_goes_to_the_first() -> None:
    """After a ReLU most windows are all zeros; handing dy to every zero would multiply it by nine."""
    x = Tensor(np.zeros((1, 1, 3, 3)), requires_grad=True)
    ops.max_pool2d(x, 3).backward(np.ones((1, 1, 1, 1)))
    assert x.grad.ravel().tolist() == [1] + [0] * 8


@pytest.mark.parametrize(("size", "cells"), [((14, 14), (4, 4)), ((7, 5), (3, 4)), ((4, 4), (1, 1)), ((2, 3), (4, 5))])
def test_adaptive_avg_pool2d_against_plain_loops(make: Make, size: Any, cells: Any) -> None:
    """Cell i of o covers ⌊i·L/o⌋ … ⌈(i+1)·L/o⌉: at 14 to 4 the windows are 4 wide and overlap."""
    x = make(2, 3, *size)
    wanted = np.empty((2, 3, *cells))
    for i in range(cells[0]):
        for j in range(cells[1]):
            rows = slice(i * size[0] // cells[0], math.ceil((i + 1) * size[0] / cells[0]))
            columns = slice(j * size[1] // cells[1], math.ceil((j + 1) * size[1] / cells[1]))
            wanted[:, :, i, j] = x.numpy()[:, :, rows, columns].mean((2, 3))
    np.testing.assert_allclose(ops.adaptive_avg_pool2d(x, cells).numpy(), wanted, rtol=1e-13, atol=1e-15)


def test_global_avg_pool2d_is_the_mean_of_each_image() -> None:
    x = host(2, 3, 5, 4)
    np.testing.assert_allclose(ops.global_avg_pool2d(x).data, x.data.mean((2, 3), keepdims=True), rtol=1e-13)


def test_adaptive_avg_pool2d_says_what_it_takes() -> None:
    with pytest.raises(ShapeError, match=r"adaptive_avg_pool2d wants \(N, C, H, W\), none of them 0, and sizes of"):
        ops.adaptive_avg_pool2d(host(2, 3, 4, 4), 0)


# ---- Normalisation ----


def normalised(xp: Any, x: Tensor, running: tuple[Any, Any], **options: Any) -> Tensor:
    c = x.shape[1]
    gamma, beta = Tensor(xp.ones(c, x.dtype)), Tensor(xp.zeros(c, x.dtype))
    return ops.batch_norm(x, gamma, beta, *running, **options)


def test_batch_norm_gives_mean_0_and_variance_1(xp: Any, make: Make) -> None:
    y = normalised(xp, make(4, 3, 5, 5), (xp.zeros(3), xp.ones(3)), training=True, eps=0.0).numpy()
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-14)
    np.testing.assert_allclose(y.var((0, 2, 3)), 1, rtol=1e-12)


def test_running_statistics_move_towards_the_batchs(xp: Any, make: Make) -> None:
    """By `momentum`, in place, and with the unbiased variance: n − 1, not n."""
    x = make(2, 3, 3, 3)
    mean, var = xp.full(3, 2.0), xp.full(3, 5.0)
    normalised(xp, x, (mean, var), training=True, momentum=0.3)
    batch_mean, batch_var = x.numpy().mean((0, 2, 3)), x.numpy().var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(to_host(mean), 0.7 * 2 + 0.3 * batch_mean, rtol=1e-12)
    np.testing.assert_allclose(to_host(var), 0.7 * 5 + 0.3 * batch_var, rtol=1e-12)


def test_evaluation_uses_the_running_statistics_and_leaves_them(xp: Any, make: Make) -> None:
    x, mean, var = make(2, 3, 3, 3), xp.full(3, 2.0), xp.full(3, 5.0)
    y = normalised(xp, x, (mean, var), training=False, eps=1e-3)
    np.testing.assert_allclose(y.numpy(), (x.numpy() - 2) / np.sqrt(5 + 1e-3), rtol=1e-12)
    assert to_host(mean).tolist() == [2.0] * 3
    assert to_host(var).tolist() == [5.0] * 3


def test_an_image_alone_is_evaluated_as_in_its_batch() -> None:
    """With batch statistics in evaluation, a prediction would depend on the other pictures."""
    x, running = host(4, 3, 5, 5), (np.zeros(3), np.ones(3))
    together = normalised(np, x, running, training=False).data[:1]
    np.testing.assert_array_equal(normalised(np, Tensor(x.data[:1]), running, training=False).data, together)


def test_backward_of_batch_norm_uses_the_statistics_of_its_forward_pass() -> None:
    """The running arrays change in place, for example in the next training step, before backward runs."""
    grads = []
    for disturb in (False, True):
        x, mean, var = host(2, 3, 3, 3), np.full(3, 0.5), np.full(3, 2.0)
        y = normalised(np, x, (mean, var), training=False)
        if disturb:
            mean += 1
            var *= 10
        y.backward(normal(Key(0), y.shape))
        grads.append(x.grad)
    np.testing.assert_array_equal(*grads)


def test_running_statistics_stay_float32() -> None:
    """Batch statistics are computed in float64: they must not turn the state into it."""
    mean, var = np.zeros(3, "float32"), np.ones(3, "float32")
    normalised(np, Tensor(host(2, 3, 3, 3).data.astype("float32")), (mean, var), training=True)
    assert mean.dtype == var.dtype == np.float32
    assert mean.any()


def test_fused_relu_is_batch_norm_then_relu(xp: Any, make: Make) -> None:
    """Values, gradients and running statistics."""
    results = []
    for fused in (True, False):
        inputs = [make(4, 3, 3, 5), make(3, name="gamma"), make(3, name="beta")]
        running = xp.zeros(3), xp.ones(3)
        y = ops.batch_norm(*inputs, *running, training=True, relu=fused)
        y = y if fused else ops.relu(y)
        y.backward(make(4, 3, 3, 5, name="dy").data)
        results.append([to_host(a) for a in (y.data, *running, *(t.grad for t in inputs))])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1)], ids=str)
def test_one_value_per_channel_is_refused_in_training(shape: Any) -> None:
    """Its variance is zero, and the unbiased one divides by zero: the running variance would be NaN for ever."""
    running = np.zeros(3), np.ones(3)
    with pytest.raises(ShapeError, match=r"more than one value per channel, got input \(1, 3, 1, 1\): use a batch of"):
        normalised(np, host(*shape), running, training=True)
    assert running[1].tolist() == [1.0] * 3
    normalised(np, host(*shape), running, training=False)


def test_batch_norm_says_what_does_not_fit() -> None:
    x = host(2, 3, 4, 4)
    with pytest.raises(ShapeError, match=r"input of shape \(2, 3, 4, 4\), gamma \(4,\) wants \(N, 4, H, W\)"):
        ops.batch_norm(x, host(4), host(4), np.zeros(4), np.ones(4), training=True)
    with pytest.raises(ShapeError, match="batch_norm got"):
        ops.batch_norm(x, host(3), host(3), np.zeros(1), np.ones(1), training=True)
    with pytest.raises(ShapeError, match=r"batch_norm got an empty input \(0, 3, 4, 4\)"):
        ops.batch_norm(host(0, 3, 4, 4), host(3), host(3), np.zeros(3), np.ones(3), training=False)


def test_running_statistics_that_cannot_move_are_refused() -> None:
    """A tensor would be replaced by its new value, not changed, and evaluation would use the old one."""
    x, affine = host(2, 3, 4, 4), (host(3), host(3))
    with pytest.raises(BackendError, match="Tensor where a NumPy or CuPy array is wanted"):
        ops.batch_norm(x, *affine, Tensor(np.zeros(3)), Tensor(np.ones(3)), training=True)
    with pytest.raises(DtypeError, match="batch_norm keeps its running statistics as floats, got int64"):
        ops.batch_norm(x, *affine, np.zeros(3, int), np.ones(3, int), training=True)


def test_local_response_norm_of_one_pixel() -> None:
    """alpha is divided by size, as in Caffe and PyTorch, and the sum is clipped at the ends."""
    x = Tensor(np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1))
    y = ops.local_response_norm(x, 3, alpha=0.3, beta=0.5, k=2.0)
    sums = np.array([1 + 4, 1 + 4 + 9, 4 + 9])
    np.testing.assert_allclose(y.data.ravel(), [1, 2, 3] / np.sqrt(2 + 0.1 * sums))


def test_local_response_norm_says_what_it_takes() -> None:
    with pytest.raises(ShapeError, match="size of at least 1"):
        ops.local_response_norm(host(1, 3, 2, 2), 0)


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


# ---- Softmax, loss ----


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


def test_guessing_costs_ln_k(xp: Any) -> None:
    loss = ops.cross_entropy(Tensor(xp.zeros((4, 10))), xp.asarray([0, 1, 2, 9]))
    assert loss.item() == pytest.approx(math.log(10))


def test_label_smoothing_by_hand() -> None:
    """Two classes, s = 0.2: q = (0.9, 0.1); softmax(ln 3, 0) = (3/4, 1/4)."""
    loss = ops.cross_entropy(Tensor(np.array([[math.log(3), 0.0]])), np.array([0]), label_smoothing=0.2)
    assert loss.item() == pytest.approx(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4))


def test_a_class_that_is_ruled_out_costs_nothing(xp: Any) -> None:
    """A logit of −∞: its probability is 0, and so is its part of the loss, where it is not the label."""
    x = Tensor(xp.asarray([[1.0, 2.0, -np.inf], [0.0, -np.inf, -np.inf]]), requires_grad=True)
    loss = ops.cross_entropy(x, xp.asarray([0, 0]))
    assert loss.item() == pytest.approx(math.log(1 + math.e) / 2)
    loss.backward()
    p = math.e / (1 + math.e)
    np.testing.assert_allclose(to_host(x.grad), [[-p / 2, p / 2, 0], [0, 0, 0]], atol=1e-15)


def test_the_loss_is_a_mean_over_the_batch() -> None:
    """A sum would make the learning rate depend on the batch size."""
    x, labels = host(3, 4), np.array([1, 0, 3])
    each = [ops.cross_entropy(Tensor(x.data[i : i + 1]), labels[i : i + 1]).item() for i in range(3)]
    loss = ops.cross_entropy(x, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(each) / 3)


@pytest.mark.parametrize(("label", "row"), [(4, 0), (-1, 2), (400, 1)])
def test_a_label_out_of_range_is_found(label: int, row: int) -> None:
    """NumPy would count −1 from the end, and train on the wrong class."""
    labels = np.array([0, 1, 3])
    labels[row] = label
    with pytest.raises(MinigradError, match=f"got label {label} in row {row}, but the logits are of 4 classes, 0 … 3"):
        ops.cross_entropy(host(3, 4), labels)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint64"])
def test_labels_of_any_width(dtype: str) -> None:
    """The range check of 300 classes must not overflow in an eight-bit label."""
    loss = ops.cross_entropy(host(2, 300), np.array([0, 100], dtype))
    assert loss.item() == pytest.approx(ops.cross_entropy(host(2, 300), np.array([0, 100])).item())


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_labels_are_whole_numbers(dtype: str) -> None:
    with pytest.raises(DtypeError, match=f"wants whole numbers as labels, got {dtype}: convert"):
        ops.cross_entropy(host(2, 3), np.zeros(2, dtype))


@pytest.mark.parametrize(("logits", "labels"), [((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3, 1, 1), (2,)), ((0, 3), (0,))])
def test_cross_entropy_says_what_it_takes(logits: Any, labels: Any) -> None:
    with pytest.raises(ShapeError, match=r"got logits \(.*\) and labels \(.*\), wants \(N, K\) and \(N,\)"):
        ops.cross_entropy(Tensor(np.zeros(logits)), np.zeros(labels, int))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_is_below_one(smoothing: float) -> None:
    with pytest.raises(MinigradError, match="label_smoothing must be from 0 to below 1, got"):
        ops.cross_entropy(host(2, 3), np.array([0, 1]), label_smoothing=smoothing)


def test_labels_on_the_host_for_logits_on_the_device(xp: Any) -> None:
    """The commonest slip when switching to the GPU deserves a sentence of its own."""
    if xp is np:
        pytest.skip("needs two backends")
    with pytest.raises(BackendError, match=r"cross_entropy got .*cupy.* and .*numpy"):
        ops.cross_entropy(Tensor(xp.zeros((2, 3))), np.array([0, 1]))


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


# ---- Something else than a tensor ----


@pytest.mark.parametrize(
    "op",
    [
        ops.relu,
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
    ("labels", "sentence"),
    [
        ([0, 1], "wants an array of whole numbers as labels, got list: use numpy.array"),
        (Tensor([0.0, 1.0]), "wants an array of whole numbers as labels, got Tensor: use numpy.array"),
        (np.zeros((2, 3)), r"wants \(N, K\) and \(N,\): labels\.argmax\(axis=1\) makes numbers of one-hot rows"),
    ],
)
def test_labels_of_other_kinds(labels: Any, sentence: str) -> None:
    with pytest.raises((DtypeError, ShapeError), match=sentence):
        ops.cross_entropy(host(2, 3), labels)


def test_dropout_knows_as_many_rows_as_there_are() -> None:
    with pytest.raises(ShapeError, match=r"dropout got an input of shape \(4, 5\) and 3 rows, wants one for each"):
        ops.dropout(host(4, 5), 0.5, Key(0), rows=np.arange(3))


@pytest.mark.parametrize("op", [ops.softmax, ops.log_softmax])
@pytest.mark.parametrize("shape", [(), (2, 0), (0, 3)], ids=str)
def test_softmax_of_nothing(op: Function, shape: Any) -> None:
    with pytest.raises(ShapeError, match=r"softmax wants \(…, K\), none of them 0, got"):
        op(host(*shape))


def test_pools_of_no_pictures() -> None:
    for shape in ((2, 3, 0, 4), (0, 3, 4, 4)):
        with pytest.raises(ShapeError, match=r"adaptive_avg_pool2d wants \(N, C, H, W\), none of them 0, and"):
            ops.global_avg_pool2d(host(*shape))
    with pytest.raises(ShapeError, match=r"max_pool2d wants \(N, C, H, W\), none of them 0, got \(0, 3, 8, 8\)"):
        ops.max_pool2d(host(0, 3, 8, 8), 2)
    with pytest.raises(ShapeError, match=r"output_size must be an int or a tuple of two, .* got \(None, 1\)"):
        ops.adaptive_avg_pool2d(host(1, 3, 8, 8), (None, 1))  # type: ignore[arg-type]
