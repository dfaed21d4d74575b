"""The kernel table: the kernels of every module against `plain_loops`, the formulas with their sums as loops.

Every call in this file also checks the contract: dtype in is dtype out, results are channels-last, inputs stay as
they were. Host data are float64 arrays that hold float32 values, so one result of the loops serves both dtypes.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import plain_loops
import pytest
from kernel_cases import (
    CONVOLUTIONS,
    FUSED,
    LARGE,
    LAYOUTS,
    ONE_OF_EACH,
    TABLE,
    TOLERANCE,
    WINDOWED,
    Case,
    Check,
    arguments,
    as_tuple,
    assert_close,
    bring,
    bring_all,
    by_shifts,
    call,
    data,
    expected,
    function_of,
    on_every_backend,
    scale_of,
)

from minigrad.backend import to_host
from minigrad.layout import Window, filter_matrix
from minigrad.random import Key, normal

# ---- The grid ----

KERNELS = (1, 2, 3, 5, 7, (1, 7), (7, 1))
STRIDES = (1, 2, 3, (1, 2))


@on_every_backend
@pytest.mark.parametrize("padding", range(4))
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_conv2d(check: Check, kernel: Any, stride: Any, padding: int) -> None:
    for name in CONVOLUTIONS:
        check(Case(name, kernel=kernel, stride=stride, padding=padding))


@on_every_backend
@pytest.mark.parametrize("padding", range(3))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_convolution_with_batch_norm_and_relu(check: Check, kernel: Any, stride: int, padding: int) -> None:
    for name in FUSED:
        check(Case(name, (3, 3, 7, 9), kernel, stride, padding))


@on_every_backend
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_pools(check: Check, kernel: Any, stride: Any, ceil_mode: bool) -> None:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    for padding in {(min(p, height // 2), min(p, width // 2)) for p in range(4)}:
        sizes = {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
        check(Case("max_pool", **sizes))
        check(Case("max_pool_dx", **sizes))
        check(Case("max_pool_dx", **sizes, values="ties"))
        check(Case("max_pool_dx", **sizes, values="near ties"))
        for count_padding in (True, False):
            check(Case("avg_pool", **sizes, options=(count_padding,)))
            check(Case("avg_pool_dx", **sizes, options=(count_padding,)))


@on_every_backend
@pytest.mark.parametrize("shape", [(1, 3, 7, 9), (2, 1, 6, 8), (1, 1, 5, 5), (3, 2, 3, 3), (5, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_odd_sizes(check: Check, case: Case, shape: tuple[int, ...]) -> None:
    """One image, one channel, one pixel."""
    if case.name == "cross_entropy":
        shape = shape[:2]
    elif shape[2] == 1:
        case = case._replace(padding=1)
    check(case._replace(shape=shape))
    if not (case.name == "conv_bn_relu_backward" and case.options):
        check(case._replace(shape=shape, filters=1))


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_any_strides(check: Check, case: Case, layout: str) -> None:
    check(case, layout=layout)


@on_every_backend
def test_every_module_has_the_whole_table(k: Any) -> None:
    for name in TABLE:
        wanted, actual = (list(inspect.signature(getattr(module, name)).parameters) for module in (plain_loops, k))
        assert actual == wanted, name


# ---- What is particular to one kernel ----


@on_every_backend
def test_conv2d_without_bias(k: Any, xp: Any, dtype: str) -> None:
    case = Case("conv2d", padding=1)
    x, weight, bias, window = arguments(case)
    (y,) = call(k, "conv2d", bring_all(xp, "conv2d", (x, weight, None, window), dtype), dtype)
    assert_close(y, expected(case)[0] - bias[:, None, None], TOLERANCE[dtype])
    (dy, x, window, _) = arguments(Case("conv2d_dw", padding=1))
    _, db = call(k, "conv2d_dw", bring_all(xp, "conv2d_dw", (dy, x, window, False), dtype), dtype)
    assert db is None


@on_every_backend
def test_filters_keep_their_memory(k: Any, xp: Any, dtype: str) -> None:
    """(O, KH, KW, C) memory, so that the next product needs no repacking."""
    args = bring_all(xp, "conv2d_dw", arguments(Case("conv2d_dw")), dtype)
    dw, _ = k.conv2d_dw(*args)
    assert filter_matrix(dw).flags.c_contiguous
    matrix = filter_matrix(dw)
    matrix[...] = 7  # a view: written through
    assert (to_host(dw) == 7).all()


@on_every_backend
@pytest.mark.parametrize("size", [(2, 2), (2, 5), (1, 2)], ids=str)
def test_pools_on_less_than_a_window(check: Check, size: tuple[int, int]) -> None:
    """In ceil mode the first window may hang over the end too."""
    for kernel, stride, padding in ((3, 2, 0), (5, 4, 0), (4, 3, 1)):
        if min(size) + 2 * padding > kernel - stride:
            for name in ("max_pool", "max_pool_dx"):
                check(Case(name, (2, 3, *size), kernel, stride, padding, ceil_mode=True))
            for name in ("avg_pool", "avg_pool_dx"):
                for counted in (True, False):
                    check(Case(name, (2, 3, *size), kernel, stride, padding, ceil_mode=True, options=(counted,)))


@on_every_backend
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_max_pool_padding_never_wins(check: Check, stride: int, ceil_mode: bool) -> None:
    for kernel, padding in ((2, 1), (3, 1), (5, 2), ((1, 7), (0, 3))):
        for name in ("max_pool", "max_pool_dx"):
            check(Case(name, (2, 3, 7, 9), kernel, stride, padding, ceil_mode, values="negative"))


@on_every_backend
def test_max_pool_sends_a_tie_to_the_first_cell(k: Any, xp: Any, dtype: str) -> None:
    """On all-equal images every window's gradient lands on its first cell inside the image, exactly."""
    window = Window.of((5, 5), 3, 1, 1)
    x = np.zeros((1, 1, 5, 5))
    dy = np.arange(1.0, 26).reshape(1, 1, 5, 5)
    dx = np.zeros((1, 1, 5, 5))
    for i in range(5):
        for j in range(5):
            dx[0, 0, max(i - 1, 0), max(j - 1, 0)] += dy[0, 0, i, j]
    (actual,) = call(k, "max_pool_dx", bring_all(xp, "max_pool_dx", (dy, x, window), dtype), dtype)
    np.testing.assert_array_equal(actual, dx)


@on_every_backend
def test_max_pool_lets_nan_through(k: Any, xp: Any, dtype: str) -> None:
    x = data("x", (2, 3, 7, 9))
    x[0, 1, 3, 4] = x[1, 2, 0, 0] = x[1, 0, 6, 8] = np.nan
    for window in (Window.of((7, 9), 3, 1, 1), Window.of((7, 9), 2, 2), Window.of((7, 9), 3, 2, 0, ceil_mode=True)):
        (y,) = call(k, "max_pool", bring_all(xp, "max_pool", (x, window), dtype), dtype)
        np.testing.assert_array_equal(y, plain_loops.max_pool(x, window))
        assert np.isnan(y).any()


@on_every_backend
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_batch_norm_with_running_statistics(check: Check, dtype: str, relu: bool) -> None:
    """In evaluation mean and var come in the dtype of x; the results do not care."""
    check(Case("batch_norm", options=(1e-3, relu)), mean_dtype=dtype)
    check(Case("batch_norm_dx", options=(1e-3, relu, False)), mean_dtype=dtype)
    check(Case("batch_norm", options=(0, relu)), mean_dtype=dtype)  # an integer is a number, too


@on_every_backend
@pytest.mark.parametrize("values", ["drift", "negative"])
def test_statistics_of_uneven_images(check: Check, values: str) -> None:
    check(Case("statistics", (5, 3, 7, 9), values=values))
    check(Case("batch_norm_dx", (5, 3, 7, 9), values=values, options=(1e-5, True, True)))


@on_every_backend
def test_batch_norm_dx_where_the_relu_stands_at_zero(k: Any, xp: Any, dtype: str) -> None:
    """Nothing passes where y is 0, whatever the sign of gamma; gamma 0 leaves the sign of beta to decide."""
    gamma, beta = np.array([1.0, -1, -2, 0, 0, 0]), np.array([0.0, 0, 2, 1, -1, 0])
    x = np.broadcast_to(np.array([-1.0, 0, 1]).reshape(1, 1, 1, 3), (2, 6, 4, 3))
    args = (np.ones_like(x), x, np.zeros(6), np.ones(6), gamma, beta, 0.0, True, False)
    dx, dgamma, dbeta = call(k, "batch_norm_dx", bring_all(xp, "batch_norm_dx", args, dtype), dtype)
    passed = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]])  # of a row of three pixels
    assert_close(dx, np.broadcast_to((passed * gamma[:, None])[:, None], x.shape), TOLERANCE[dtype])
    assert_close(dbeta, 8.0 * passed.sum(1), TOLERANCE[dtype])
    assert_close(dgamma, 8.0 * (passed * [-1, 0, 1]).sum(1), TOLERANCE[dtype], scale=1)


@on_every_backend
def test_batch_norm_of_a_constant_channel(k: Any, xp: Any, dtype: str) -> None:
    """Variance zero: eps alone keeps it finite, and the result is beta."""
    x = np.full((2, 3, 4, 5), 0.75)
    mean, var = call(k, "statistics", bring_all(xp, "statistics", (x,), dtype), dtype)
    np.testing.assert_array_equal(mean, 0.75)
    np.testing.assert_array_equal(var, 0)
    gamma, beta = np.ones(3), np.array([-1.0, 0.0, 2.0])
    (y,) = call(k, "batch_norm", bring_all(xp, "batch_norm", (x, mean, var, gamma, beta, 1e-5, False), dtype), dtype)
    wanted = np.zeros_like(x) + beta[:, None, None]
    assert_close(y, wanted, TOLERANCE[dtype], scale=0.75 / 1e-5**0.5)  # of the terms x / std and −mean / std


@on_every_backend
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("constants", [(1e-4, 0.75, 1.0), (0.9, 0.75, 2.0), (2.0, 0.5, 0.5), (1.0, 1.0, 1.0)], ids=str)
def test_lrn(check: Check, size: int, constants: tuple[float, ...]) -> None:
    for name in ("lrn", "lrn_dx"):
        check(Case(name, (2, 7, 3, 5), options=(size, *constants)))


@on_every_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (5, 10), (64, 1000)], ids=str)
def test_cross_entropy(check: Check, shape: tuple[int, int], smoothing: float) -> None:
    for scale in (1.0, 1024.0):  # exp(1024) overflows; a power of two keeps the logits exact in float32
        check(Case("cross_entropy", shape, options=(scale, smoothing)))


@on_every_backend
@pytest.mark.parametrize("channels", [(4,), (1, 1), (64, 128, 32, 32)], ids=str)
def test_concat(check: Check, channels: tuple[int, ...]) -> None:
    check(Case("concat", options=channels))


@on_every_backend
def test_concat_and_add_of_mixed_layouts(k: Any, xp: Any, dtype: str) -> None:
    parts = [data(layout, (2, 3, 4, 5)) for layout in LAYOUTS]
    there = [bring(xp, part.astype(dtype), layout) for part, layout in zip(parts, LAYOUTS, strict=True)]
    np.testing.assert_array_equal(call(k, "concat", [there], dtype)[0], np.concatenate(parts, axis=1))
    (total,) = call(k, "add", [there[1], there[2], None], dtype)
    assert_close(total, parts[1] + parts[2], TOLERANCE[dtype])


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (4, 3, 1, 7), (5, 6), (7,), ()], ids=str)
def test_add(k: Any, xp: Any, dtype: str, shape: tuple[int, ...]) -> None:
    a, b, c = (data(name, shape).astype(dtype) for name in "abc")
    (total,) = call(k, "add", [bring(xp, a), bring(xp, b), None], dtype)
    np.testing.assert_array_equal(total, a + b)
    for layout in LAYOUTS:  # `out` keeps its memory, and may be an operand: later gradients go into the sum
        out, other = bring(xp, c, "c_order"), bring(xp, b, layout)
        assert k.add(bring(xp, a), other, out) is out
        np.testing.assert_array_equal(to_host(out), a + b)
        assert k.add(out, other, out) is out
        np.testing.assert_array_equal(to_host(out), a + b + b)


# ---- Many blocks: sizes at which the fast kernels split images, or bands of rows ----


@pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if c.name in (*WINDOWED, *FUSED)], ids=str)
def test_both_definitions_agree(case: Case) -> None:
    for wanted, actual in zip(expected(case), by_shifts(case), strict=True):
        assert_close(actual, wanted, 1e-12)


@on_every_backend
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_blocks(k: Any, xp: Any, case: Case) -> None:
    """A lost row or block is off by 1e-3 or more. The widest rounding, 1.5e-5, is dgamma's: rounding the mean to
    float32 moves every x̂ of a channel the same way.
    """
    args = bring_all(xp, case.name, arguments(case), "float32")
    results = call(k, case.name, args, "float32")
    for actual, wanted in zip(results, expected(case), strict=True):
        assert_close(actual, wanted, 0 if case.name == "max_pool" else 3e-5, scale_of(case))
    for actual, again in zip(results, as_tuple(function_of(k, case.name)(*args)), strict=True):
        np.testing.assert_array_equal(actual, to_host(again), err_msg="a second run gives other bits")


# ---- Digits: sums over 131,072 pixels in float32 ----

MANY_PIXELS = [(128, 4, 32, 32), (2, 4, 256, 256)]


@on_every_backend
@pytest.mark.parametrize("ratio", [0, 30, 300, 3000])
@pytest.mark.parametrize("shape", MANY_PIXELS, ids=str)
def test_statistics_keep_their_digits(k: Any, xp: Any, shape: tuple[int, ...], ratio: float) -> None:
    """A variance is a small difference of large squares: Σx² − (Σx)² in float32 errs by 8 % at a mean/std of 300."""
    x = (normal(Key(3), shape) + ratio).astype(np.float32)
    mean, var = call(k, "statistics", [bring(xp, x)], "float32")
    true_mean, true_var = plain_loops.statistics(x)
    np.testing.assert_allclose(mean, true_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var, true_var, rtol=1e-6)

    # The input's own float32 grid is ratio · 6e-8 standard deviations wide; the result may not be much worse.
    gamma, beta = np.ones(4), np.zeros(4)
    args = bring_all(xp, "batch_norm", (x, true_mean, true_var, gamma, beta, 1e-5, False), "float32")
    (y,) = call(k, "batch_norm", args, "float32")
    wanted = plain_loops.batch_norm(x.astype(np.float64), true_mean, true_var, gamma, beta, 1e-5, False)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6 * max(ratio, 1))


@on_every_backend
@pytest.mark.parametrize("shape", MANY_PIXELS, ids=str)
def test_column_sums_keep_their_digits(k: Any, xp: Any, shape: tuple[int, ...]) -> None:
    x = data("x", shape)
    dy = data("dy", shape) + 1
    for case in (Case("batch_norm_dx", shape, options=(1e-5, False, True)), Case("conv2d_dw", shape, 1, filters=4)):
        args = bring_all(xp, case.name, arguments(case), "float32")
        db = call(k, case.name, args, "float32")[-1]
        np.testing.assert_allclose(db, arguments(case)[0].sum((0, 2, 3)), rtol=1e-6)
    mean, var = plain_loops.statistics(x)
    args = bring_all(xp, "batch_norm_dx", (dy * x, x, mean, var, np.ones(4), np.zeros(4), 1e-5, False, True), "float32")
    _, dgamma, _ = call(k, "batch_norm_dx", args, "float32")
    wanted = plain_loops.batch_norm_dx(dy * x, x, mean, var, np.ones(4), np.zeros(4), 1e-5, False, True)[1]
    np.testing.assert_allclose(dgamma, wanted, rtol=1e-6)
