"""The kernel table: every fast kernel against the plain loops of `minigrad.kernels.reference`.

Every call in this file also checks the contract: dtype in is dtype out, results are channels-last, inputs stay as
they were. Host data are float64 arrays that hold float32 values, so one reference result serves both dtypes.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cuda_on_cpu
import numpy as np
import pytest

from minigrad import threads
from minigrad.backend import to_host
from minigrad.errors import ShapeError
from minigrad.kernels import cupy_, kernels, numpy_, reference
from minigrad.kernels.numpy_ import winograd
from minigrad.layout import Array, Window, filter_matrix, images, pixels
from minigrad.random import Key, integers, normal

CONVOLUTIONS = ("conv2d", "conv2d_dx", "conv2d_dw", "conv2d_backward")
WINDOWED = (*CONVOLUTIONS, "max_pool", "max_pool_dx", "avg_pool", "avg_pool_dx")
PER_CHANNEL = ("statistics", "batch_norm", "batch_norm_dx", "lrn", "lrn_dx")
FUSED = ("conv2d_relu", "conv2d_statistics", "conv_bn_relu_backward")
TABLE = (*WINDOWED, "max_pool_winners", *FUSED, *PER_CHANNEL, "cross_entropy", "concat", "add")
LAYOUTS = ("channels_last", "c_order", "sliced", "reversed")
PROBABILITY = 1.0  # the scale of p − target, however small the difference
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}  # of the largest value of a result


# ---- The cases ----


class Case(NamedTuple):
    """One call of one kernel: its name, the sizes, and the arguments that follow the arrays."""

    name: str
    shape: tuple[int, ...] = (2, 3, 7, 9)
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    ceil_mode: bool = False
    options: tuple[Any, ...] = ()
    values: str = "normal"
    filters: int = 4

    @property
    def window(self) -> Window:
        height, width = self.shape[2:]
        return Window.of((height, width), self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode)

    def __str__(self) -> str:
        given = {k: v for k, v in self._asdict().items() if v != self._field_defaults.get(k)}
        return " ".join(str(v) if k == "name" else f"{k}={v}" for k, v in given.items()).replace(", ", ",")


def data(name: str, shape: tuple[int, ...], values: str = "normal") -> Array:
    """Deterministic numbers that float32 holds exactly, as float64."""
    x = normal(Key(1).fold(name, *shape), shape)
    if values == "ties":  # small integers, most of them zero: what ReLU leaves, only worse
        x = np.maximum(np.round(x), 0)
    elif values == "near ties":  # neighbours on float32's grid: an equality with a tolerance would call them equal
        x = 1 + np.round(2 * x) * 2.0**-22
    elif values == "negative":
        x = -np.abs(x) - 1
    elif values == "drift":  # every image, and every row of it, has another mean
        x += 3 * np.arange(shape[0])[:, None, None, None] + 0.1 * np.arange(shape[2])[:, None]
    elif values == "offset":
        x += 1
    return x.astype(np.float32).astype(np.float64)


@functools.cache
def arguments(case: Case) -> tuple[Any, ...]:
    """The kernel's arguments in order, on the host."""
    shape, options = case.shape, case.options
    if case.name == "cross_entropy":
        scale, smoothing = options
        return data("logits", shape) * scale, integers(Key(2), shape[1], shape[0]), smoothing
    x = data("x", shape, case.values)
    if case.name == "concat":
        return ([data(f"x{i}", (shape[0], c, *shape[2:])) for i, c in enumerate(options)],)
    if case.name == "add":
        return x, data("b", shape), None
    if case.name in ("statistics", "lrn"):
        return (x, *options)
    if case.name == "lrn_dx":
        return (data("dy", shape), x, *options)
    if case.name.startswith("batch_norm"):
        channels = (shape[1],)
        affine = data("gamma", channels), data("beta", channels)
        if case.name == "batch_norm":
            return (x, *reference.statistics(x), *affine, *options)
        return (data("dy", shape, "offset"), x, *reference.statistics(x), *affine, *options)
    window = case.window
    outputs = case.filters if case.name.startswith("conv") else shape[1]
    weight = data("weight", (outputs, shape[1], *window.kernel))
    dy = data("dy", (shape[0], outputs, *window.output), "offset")
    if case.name == "conv_bn_relu_backward":
        y, mean, var = reference.conv2d_statistics(x, weight, None, window)
        ends = (0, *np.cumsum(options, dtype=int), outputs)  # options: the widths of all parts but the last
        dzs = [dy[:, start:end] for start, end in itertools.pairwise(ends)]
        affine = data("gamma", (outputs,)), data("beta", (outputs,))
        return dzs, x, weight, window, y, mean, var, *affine, 1e-3, True, True
    return {
        "conv2d_relu": lambda: (x, weight, data("bias", (outputs,)), window),
        "conv2d_statistics": lambda: (x, weight, data("bias", (outputs,)), window),
        "conv2d": lambda: (x, weight, data("bias", (outputs,)), window),
        "conv2d_dx": lambda: (dy, weight, window),
        "conv2d_dw": lambda: (dy, x, window, True),
        "conv2d_backward": lambda: (dy, x, weight, window, True, True, True),
        "max_pool": lambda: (x, window),
        "max_pool_dx": lambda: (dy, x, window),
        "avg_pool": lambda: (x, window, *options),
        "avg_pool_dx": lambda: (dy, window, *options),
    }[case.name]()


@functools.cache
def expected(case: Case) -> tuple[Array, ...]:
    """The results of the definition in float64. Large windows are too slow for loops: see `by_shifts`."""
    by_loops = np.prod(case.shape) < 10_000 or case.name not in WINDOWED
    return as_tuple(kernel(reference, case.name)(*arguments(case)) if by_loops else by_shifts(case))


def kernel(module: Any, name: str) -> Callable[..., Any]:
    """A kernel by name; max_pool_dx as a function of x, by way of the module's own winners."""
    if name == "max_pool_dx":
        return lambda dy, x, window: module.max_pool_dx(dy, module.max_pool_winners(x, window)[1], window)
    return getattr(module, name)  # type: ignore[no-any-return]


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


# ---- Calling a kernel, and what every call is checked for ----


def bring(xp: Any, host: Array, layout: str = "channels_last") -> Array:
    """Put a host array where `xp` computes; images and filters in the given memory layout."""
    if host.ndim != 4 or layout == "c_order":
        return xp.asarray(np.ascontiguousarray(host))
    if layout == "channels_last":
        n, _, h, w = host.shape
        return images(xp.asarray(np.ascontiguousarray(pixels(host))), n, h, w)
    if layout == "reversed":
        return xp.asarray(np.ascontiguousarray(host[:, ::-1, :, ::-1]))[:, ::-1, :, ::-1]
    n, c, h, w = host.shape
    around = np.full((n, c + 2, 2 * h, w + 1), np.nan, host.dtype)  # a kernel that reads past its input shows it
    around[:, 1:-1, ::2, :-1] = host
    return xp.asarray(around)[:, 1:-1, ::2, :-1]


def is_channels_last(x: Array) -> bool:
    return x.ndim != 4 or x.transpose(0, 2, 3, 1).flags.c_contiguous


def bring_all(
    xp: Any, name: str, args: tuple[Any, ...], dtype: str, layout: str = "channels_last", mean_dtype: str = "float64"
) -> list[Any]:
    """The arguments of kernel `name` on the device: floating arrays in `dtype`, mean and var in `mean_dtype`."""

    def move(value: Any, to: str) -> Any:
        if isinstance(value, list):
            return [move(v, to) for v in value]
        if not isinstance(value, np.ndarray):
            return value
        return bring(xp, value.astype(to) if value.dtype.kind == "f" else value, layout)

    names = inspect.signature(getattr(reference, name)).parameters
    return [
        move(value, mean_dtype if parameter in ("mean", "var") else dtype)
        for parameter, value in zip(names, args, strict=True)
    ]


def arrays_in(args: Any) -> Iterator[Array]:
    for value in args:
        if isinstance(value, list):
            yield from arrays_in(value)
        elif hasattr(value, "dtype"):
            yield value


def call(k: Any, name: str, args: list[Any], dtype: str) -> tuple[Array, ...]:
    """Call kernel `name`, check what the contract says of every call, and bring the results to the host."""
    before = [np.array(to_host(a)) for a in arrays_in(args)]
    results = as_tuple(kernel(k, name)(*args))
    for array, kept in zip(arrays_in(args), before, strict=True):
        np.testing.assert_array_equal(to_host(array), kept, err_msg=f"{name} changed an input")
    for i, result in enumerate(results):
        if result is not None:
            is_statistic = name == "statistics" or (name == "conv2d_statistics" and i > 0)
            assert result.dtype == ("float64" if is_statistic else dtype), f"{name} returns {result.dtype}"
            assert is_channels_last(result), f"{name} returns strides {result.strides} for {result.shape}"
    return tuple(None if r is None else to_host(r) for r in results)


def assert_close(actual: Array, wanted: Array, tolerance: float, scale: float = 0) -> None:
    """Equal to within tolerance times the largest value, or times `scale` where the terms are larger than the sum."""
    assert actual.shape == wanted.shape
    scale = max(scale, np.max(np.abs(wanted), initial=0)) or 1
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * scale)


Check = Callable[..., None]


BACKENDS = [  # where the arrays live, and the module that computes
    pytest.param("numpy", "table", id="numpy"),
    pytest.param("fake_cupy", "table", id="fake_cupy"),
    pytest.param("cupy", "table", id="cupy", marks=pytest.mark.gpu),
    pytest.param("fake_cupy", "reversed", id="fake_cupy reversed"),
]
on_every_backend = pytest.mark.parametrize(("xp", "k"), BACKENDS, indirect=True)


@pytest.fixture
def k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, xp: Any) -> Any:
    """The kernel module for xp's arrays; "reversed" runs the threads of CUDA kernels last to first."""
    monkeypatch.setattr(cuda_on_cpu, "REVERSED", request.param == "reversed")
    return kernels(xp.zeros(1))


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def check(k: Any, xp: Any, dtype: str) -> Check:
    """check(case) compares the fast kernel with the definition."""

    def check(case: Case, **how: str) -> None:
        results = call(k, case.name, bring_all(xp, case.name, arguments(case), dtype, **how), dtype)
        scale = PROBABILITY if case.name == "cross_entropy" else 0.0
        if case.name == "conv_bn_relu_backward":  # a bias in front of batch norm has the gradient 0: a sum of others
            scale = max(np.abs(wanted).max() for wanted in expected(case))
        for actual, wanted in zip(results, expected(case), strict=True):
            exact = case.name == "max_pool"
            assert_close(actual, wanted, 0 if exact else TOLERANCE[dtype], scale)

    return check


# ---- The grid ----

KERNELS = (1, 2, 3, 5, 7, (1, 7), (7, 1))
STRIDES = (1, 2, 3, (1, 2))
ONE_OF_EACH = [
    *(Case(name, stride=2, padding=1) for name in CONVOLUTIONS),
    *(Case(name) for name in CONVOLUTIONS),
    *(Case(name, kernel=1) for name in CONVOLUTIONS),
    *(Case(name, stride=2, padding=1, ceil_mode=True, values="ties") for name in ("max_pool", "max_pool_dx")),
    *(Case(name, padding=1, values="ties") for name in ("max_pool", "max_pool_dx")),
    *(Case(name, stride=2, padding=1, options=(c,)) for name in ("avg_pool", "avg_pool_dx") for c in (True, False)),
    *(Case(name, padding=1) for name in FUSED),
    *(Case(name, kernel=1) for name in FUSED),
    Case("conv_bn_relu_backward", kernel=1, options=(1,)),
    Case("conv_bn_relu_backward", stride=2, options=(2, 1)),
    Case("statistics"),
    *(Case("batch_norm", options=(1e-5, relu)) for relu in (True, False)),
    *(Case("batch_norm_dx", options=(1e-5, relu, thr)) for relu in (True, False) for thr in (True, False)),
    *(Case(name, options=(3, 0.5, 0.75, 1.0)) for name in ("lrn", "lrn_dx")),
    Case("cross_entropy", (7, 10), options=(1.0, 0.1)),
    Case("concat", options=(3, 1, 5)),
    Case("add"),
]


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
        wanted, actual = (list(inspect.signature(getattr(module, name)).parameters) for module in (reference, k))
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


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 5, 13, 14), (3, 2, 2, 2), (2, 4, 1, 1), (2, 1, 4, 9)], ids=str)
def test_winograd(dtype: str, shape: tuple[int, ...], padding: Any, layout: str) -> None:
    """Tiles that stick out, tiles of nothing but padding; few channels, for which the table takes im2col."""
    if min(shape[2:]) + 2 * np.min(padding) < 3:
        padding = 1
    case = Case("conv2d", shape, padding=padding)
    assert not winograd.pays(shape, case.filters, case.window)
    (y,) = call(winograd, "conv2d", bring_all(np, case.name, arguments(case), dtype, layout), dtype)
    assert_close(y, expected(case)[0], TOLERANCE[dtype])
    if np.max(padding) > 1:
        return
    case = case._replace(name="conv2d_backward")
    dy, x, weight, window, _, _, with_bias = bring_all(np, case.name, arguments(case), dtype, layout)
    results = call(winograd, "conv2d_backward", [dy, x, weight, window, with_bias], dtype)
    for actual, wanted in zip(results, expected(case), strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


def test_winograd_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("conv2d", "conv2d_backward"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *args, n=name, f=function: seen.append(n) or f(*args))

    def taken(case: Case) -> list[str]:
        seen.clear()
        for name in ("conv2d", "conv2d_backward"):
            getattr(numpy_, name)(*bring_all(np, name, arguments(case._replace(name=name)), "float32"))
        return list(seen)

    case = Case("conv2d", (1, 64, 28, 28), padding=1, filters=64)
    assert taken(case) == ["conv2d", "conv2d_backward"]
    assert taken(case._replace(shape=(1, 32, 28, 28))) == []  # few channels
    assert taken(case._replace(filters=32)) == []
    assert taken(case._replace(shape=(1, 64, 7, 7))) == []  # few pixels
    assert taken(case._replace(stride=2)) == []
    assert taken(case._replace(kernel=(1, 3), padding=(0, 1))) == []


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
        np.testing.assert_array_equal(y, reference.max_pool(x, window))
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

LARGE = [
    *(
        Case(name, shape, kernel, stride, padding, filters=filters)
        for name in CONVOLUTIONS
        for shape, kernel, stride, padding, filters in (
            ((1, 16, 131, 127), 3, 1, 1, 24),  # one large image: bands of rows
            ((1, 3, 224, 224), 7, 2, 3, 16),  # a stem
            ((67, 32, 14, 14), 3, 1, 1, 40),  # many images and a rest
            ((211, 24, 7, 7), 5, 1, 2, 16),
            ((29, 64, 28, 28), 1, 1, 0, 32),  # the pixel matrix itself
            ((19, 16, 29, 29), 3, 2, 0, 24),
            ((9, 16, 33, 31), (1, 7), 1, (0, 3), 16),
            ((1, 48, 67, 61), 3, 1, 1, 64),  # many channels: Winograd's, here in bands of rows of tiles
            ((37, 56, 13, 14), 3, 1, 0, 48),
        )
    ),
    *(
        Case(name, shape, kernel, stride, padding, ceil_mode, values="ties", options=options)
        for name, options in (
            ("max_pool", ()),
            ("max_pool_dx", ()),
            ("avg_pool", (True,)),
            ("avg_pool", (False,)),
            ("avg_pool_dx", (True,)),
            ("avg_pool_dx", (False,)),
        )
        for shape, kernel, stride, padding, ceil_mode in (
            ((1, 16, 131, 127), 3, 2, 1, False),
            ((1, 32, 112, 112), 3, 2, 0, True),
            ((37, 32, 28, 28), 3, 1, 1, False),
            ((131, 64, 7, 7), 7, 1, 0, False),
        )
    ),
    *(
        Case(name, shape, options=options, values="drift")
        for name, options in (
            ("statistics", ()),
            ("batch_norm", (1e-5, True)),
            ("batch_norm_dx", (1e-5, True, True)),
            ("batch_norm_dx", (1e-5, False, False)),
            ("add", ()),
            ("concat", (16, 9, 7)),
        )
        for shape in ((1, 16, 229, 223), (29, 64, 28, 28), (501, 40, 7, 7))
    ),
    *(
        Case(name, shape, options=(5, 1e-4, 0.75, 1.0))
        for name in ("lrn", "lrn_dx")
        for shape in ((1, 32, 111, 127), (17, 64, 28, 28))
    ),
    Case("cross_entropy", (515, 1000), options=(1.0, 0.1)),
]


def by_shifts(case: Case) -> tuple[Array, ...]:
    """The windowed kernels in float64 with one array operation for each (u, v): a second, quicker definition."""
    name, args, window = case.name, arguments(case), case.window
    (h, w), (kh, kw), (oh, ow) = window.input, window.kernel, window.output
    (top, left), (down, across) = window.padding, window.stride
    room = (top, top + down), (left, left + across)  # on the far sides enough for ceil mode

    def slide(padded: Array) -> Array:  # (N, C, OH, OW, KH, KW)
        every = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), (2, 3))
        return every[:, :, ::down, ::across][:, :, :oh, :ow]

    def windows(x: Array, fill: float) -> Array:
        return slide(np.pad(x, ((0, 0), (0, 0), *room), constant_values=fill))

    def spread(share: Callable[[int, int], Array], n: int, c: int) -> Array:  # the transpose of `windows`
        padded = np.zeros((n, c, sum(room[0]) + h, sum(room[1]) + w))
        for u in range(kh):
            for v in range(kw):
                padded[:, :, u : u + down * oh : down, v : v + across * ow : across] += share(u, v)
        return padded[:, :, top : top + h, left : left + w]

    if name == "conv2d":
        x, weight, bias, _ = args
        y = np.tensordot(windows(x, 0), weight, ((1, 4, 5), (1, 2, 3))) + bias
        return (y.transpose(0, 3, 1, 2),)
    if name == "conv2d_dx":
        dy, weight, _ = args
        by_pixel = dy.transpose(0, 2, 3, 1)
        return (spread(lambda u, v: (by_pixel @ weight[:, :, u, v]).transpose(0, 3, 1, 2), len(dy), weight.shape[1]),)
    if name == "conv2d_backward":
        return by_shifts(case._replace(name="conv2d_dx")) + by_shifts(case._replace(name="conv2d_dw"))
    if name == "conv2d_dw":
        dy, x, _, _ = args
        return np.tensordot(dy, windows(x, 0), ((0, 2, 3), (0, 2, 3))), dy.sum((0, 2, 3))
    if name == "max_pool":
        return (windows(args[0], -np.inf).max((4, 5)),)
    if name == "max_pool_dx":
        dy, x, _ = args
        seen = windows(x, -np.inf)
        first = seen.reshape(*seen.shape[:4], kh * kw).argmax(4)
        return (spread(lambda u, v: dy * (first == u * kw + v), *x.shape[:2]),)
    cells = np.full((1, 1, h + 2 * top, w + 2 * left), float(args[-1]))  # does padding count?
    cells[:, :, top : top + h, left : left + w] = 1
    count = slide(np.pad(cells, ((0, 0), (0, 0), (0, down), (0, across)))).sum((4, 5))
    if name == "avg_pool":
        return (windows(args[0], 0).sum((4, 5)) / count,)
    return (spread(lambda u, v: args[0] / count, *args[0].shape[:2]),)


@pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if c.name in WINDOWED], ids=str)
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
        assert_close(actual, wanted, 0 if case.name == "max_pool" else 3e-5)
    for actual, again in zip(results, as_tuple(kernel(k, case.name)(*args)), strict=True):
        np.testing.assert_array_equal(actual, to_host(again), err_msg="a second run gives other bits")


on_cupy = pytest.mark.parametrize(("xp", "k"), [p for p in BACKENDS if p.values[0] != "numpy"], indirect=True)


@on_cupy
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_cupy_in_several_blocks(monkeypatch: pytest.MonkeyPatch, k: Any, xp: Any, name: str) -> None:
    """On a GPU only a batch whose patches pass 256 MiB is cut: here into images or pairs of them."""
    case = Case(name, (5, 3, 7, 9), padding=1, stride=2)
    for size in (1, 9000):
        monkeypatch.setattr(cupy_, "PATCH_BYTES", size)
        results = call(k, name, bring_all(xp, name, arguments(case), "float64"), "float64")
        for actual, wanted in zip(results, expected(case), strict=True):
            assert_close(actual, wanted, 1e-12)


@on_cupy
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_cupy_with_long_indices(monkeypatch: pytest.MonkeyPatch, check: Check, case: Case) -> None:
    """Arrays of 2³⁰ values are indexed with 64 bits; here all are."""
    monkeypatch.setattr(cupy_, "INT", 0)
    check(case)


@on_cupy
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_cupy_with_packs(check: Check, case: Case) -> None:
    """16 bytes at once where rows start at such borders: 8 channels, and columns 8 to 15 of a wider matrix."""
    if case.name not in ("cross_entropy", "concat"):
        case = case._replace(shape=(2, 8, 5, 6), filters=12)
    check(case)


@on_cupy
def test_columns_of_a_wider_matrix_are_read_where_they_are(k: Any, xp: Any) -> None:
    """Parts of a concatenation, at offsets of 8, 3 and 1 channels: same bits as from copies."""
    wide = bring(xp, data("wide", (2, 40, 5, 6)).astype(np.float32))
    window, weight = Window.of((5, 6), 3, 1, 1), bring(xp, data("w", (6, 8, 3, 3)).astype(np.float32))
    for start in (8, 3, 1):
        part = wide[:, start : start + 8]
        copy = images(pixels(part).copy(), 2, 5, 6)
        assert cupy_.matrix(part)[1] == 40
        channels = (
            *k.statistics(part),
            *(bring(xp, data(name, (8,)).astype(np.float32)) for name in ("gamma", "beta")),
        )
        for name, *rest in (
            ("conv2d", weight, None, window),
            ("conv2d_dw", part, Window.of((5, 6), 1), True),
            ("statistics",),
            ("batch_norm", *channels, 1e-5, True),
            ("batch_norm_dx", part, *channels, 1e-5, True, True),
            ("max_pool", window),
            ("avg_pool", window, True),
            ("avg_pool_dx", window, True),
            ("lrn", 5, 0.5, 0.75, 1.0),
            ("lrn_dx", part, 5, 0.5, 0.75, 1.0),
        ):
            results = (as_tuple(getattr(k, name)(x, *rest)) for x in (part, copy))
            for of_part, of_copy in zip(*results, strict=True):
                np.testing.assert_array_equal(to_host(of_part), to_host(of_copy), err_msg=name)
        np.testing.assert_array_equal(to_host(k.concat([part, copy])), to_host(k.concat([copy, part])))


@on_cupy
def test_cupy_joins_the_parts_of_dz(k: Any, xp: Any, dtype: str) -> None:
    """Upstream gradients of several units, one of them columns of a wider matrix, are one gradient."""
    shape, window = (2, 20, 5, 6), Window.of((5, 6), 1)
    dz, y, x = (data(name, shape, "offset") for name in ("dz", "y", "x"))
    weight, gamma, beta = data("w", (20, 20, 1, 1)), data("gamma", (20,)), data("beta", (20,))
    rest = (x, weight, window, y, *reference.statistics(y), gamma, beta, 1e-5, True, True)
    wanted = reference.conv_bn_relu_backward([dz], *rest)
    parts = [dz[:, :8], dz[:, 8:9], dz[:, 9:]]
    args = bring_all(xp, "conv_bn_relu_backward", (parts, *rest), dtype)
    args[0][2] = bring(xp, dz.astype(dtype))[:, 9:]
    for actual, expected in zip(call(k, "conv_bn_relu_backward", args, dtype), wanted, strict=True):
        assert_close(actual, expected, TOLERANCE[dtype], scale=1)  # db is zero: differences of terms of that size


@on_cupy
def test_a_matrix_wider_than_the_grid(k: Any, xp: Any) -> None:
    x = xp.zeros((1, 1), np.float32)
    wide = xp.lib.stride_tricks.as_strided(x, (1, 2**22, 1, 1), (0, 0, 0, 0))
    with pytest.raises(ShapeError, match="4194304 columns, the GPU's grid ends at"):
        k.statistics(wide)


def test_cuda_kernels_compile_without_spills(tmp_path: Path) -> None:
    """For an A100 and an H100, in the types of training and the widest; a register kept in memory is slow."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile for sm_80 and sm_90")
    sources = sorted(path.stem for path in Path(cupy_.__file__).with_name("cuda").glob("*.cu"))
    assert len(sources) == 5
    for arch, choices in (
        ("sm_80", ("f", "i", 4)),
        ("sm_90", ("f", "i", 4)),
        ("sm_90", ("d", "q", 2)),
    ):
        source, cubin = tmp_path / "all.cu", tmp_path / "all.cubin"
        source.write_text(cupy_.cuda_source(*choices, *sources))
        options = ["-cubin", f"-arch={arch}", "-std=c++17", "-Werror", "all-warnings", "--ptxas-options=-v"]
        done = subprocess.run([nvcc, *options, source, "-o", cubin], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes spill", done.stderr)
        assert len(spills) >= 2 * 20
        assert set(spills) == {"0"}, done.stderr


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = threads.num_threads()
    yield
    threads.set_num_threads(before)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_for_any_number_of_threads(restore_threads: None, case: Case) -> None:
    args = bring_all(np, case.name, arguments(case), "float32")
    module = kernels(np.zeros(1))
    runs = []
    for count in (1, 2, 5):
        threads.set_num_threads(count)
        runs.append(call(module, case.name, args, "float32"))
    for first, second, third in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


# ---- Digits: sums over 131,072 pixels in float32 ----

MANY_PIXELS = [(128, 4, 32, 32), (2, 4, 256, 256)]


@on_every_backend
@pytest.mark.parametrize("ratio", [0, 30, 300, 3000])
@pytest.mark.parametrize("shape", MANY_PIXELS, ids=str)
def test_statistics_keep_their_digits(k: Any, xp: Any, shape: tuple[int, ...], ratio: float) -> None:
    """A variance is a small difference of large squares: Σx² − (Σx)² in float32 errs by 8 % at a mean/std of 300."""
    x = (normal(Key(3), shape) + ratio).astype(np.float32)
    mean, var = call(k, "statistics", [bring(xp, x)], "float32")
    true_mean, true_var = reference.statistics(x)
    np.testing.assert_allclose(mean, true_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var, true_var, rtol=1e-6)

    # The input's own float32 grid is ratio · 6e-8 standard deviations wide; the result may not be much worse.
    gamma, beta = np.ones(4), np.zeros(4)
    args = bring_all(xp, "batch_norm", (x, true_mean, true_var, gamma, beta, 1e-5, False), "float32")
    (y,) = call(k, "batch_norm", args, "float32")
    wanted = reference.batch_norm(x.astype(np.float64), true_mean, true_var, gamma, beta, 1e-5, False)
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
    mean, var = reference.statistics(x)
    args = bring_all(xp, "batch_norm_dx", (dy * x, x, mean, var, np.ones(4), np.zeros(4), 1e-5, False, True), "float32")
    _, dgamma, _ = call(k, "batch_norm_dx", args, "float32")
    wanted = reference.batch_norm_dx(dy * x, x, mean, var, np.ones(4), np.zeros(4), 1e-5, False, True)[1]
    np.testing.assert_allclose(dgamma, wanted, rtol=1e-6)
