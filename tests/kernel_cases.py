"""What the tests of kernels share: calls of every kernel, their results by definition, and the checks of a call.

The fixtures `k` (a kernel module), `dtype` and `check` that go with it are in conftest.py.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import plain_loops
import pytest

from minigrad.backend import to_host
from minigrad.layout import Array, Window, images, pixels
from minigrad.random import Key, integers, normal

CONVOLUTIONS = ("conv2d", "conv2d_dx", "conv2d_dw", "conv2d_backward")
WINDOWED = (*CONVOLUTIONS, "max_pool", "max_pool_dx", "avg_pool", "avg_pool_dx")
PER_CHANNEL = ("statistics", "move_running", "batch_norm", "batch_norm_dx", "lrn", "lrn_dx")
FUSED = ("conv_bn_relu", "conv2d_statistics", "conv_bn_relu_backward")
TABLE = (*WINDOWED, "max_pool_winners", *FUSED, *PER_CHANNEL, "cross_entropy", "matmul", "concat", "add", "dropout")
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
    if case.name == "matmul":
        *stack, m, k, n = shape
        return data("a", (m, k)), data("b", (*stack, k, n)), None
    x = data("x", shape, case.values)
    if case.name == "concat":
        return ([data(f"x{i}", (shape[0], c, *shape[2:])) for i, c in enumerate(options)],)
    if case.name == "add":
        return x, data("b", shape), None
    if case.name == "dropout":
        p, named = options
        return x, p, Key(3), integers(Key(4), 50_000, shape[0]) if named else None
    if case.name == "move_running":
        channels = (shape[1],)
        running = data("running_mean", channels), 1 + data("running_var", channels) ** 2
        return (*running, *plain_loops.statistics(x), x.size // shape[1], *options)
    if case.name in ("statistics", "lrn"):
        return (x, *options)
    if case.name == "lrn_dx":
        return (data("dy", shape), x, *options)
    if case.name.startswith("batch_norm"):
        channels = (shape[1],)
        affine = data("gamma", channels), data("beta", channels)
        if case.name == "batch_norm":
            return (x, *plain_loops.statistics(x), *affine, *options)
        return (data("dy", shape, "offset"), x, *plain_loops.statistics(x), *affine, *options)
    window = case.window
    outputs = case.filters if case.name.startswith("conv") else shape[1]
    weight = data("weight", (outputs, shape[1], *window.kernel))
    dy = data("dy", (shape[0], outputs, *window.output), "offset")
    if case.name in ("conv_bn_relu", "conv_bn_relu_backward"):
        y = data("y", dy.shape)  # any images do for those whose statistics the gradient goes through
        ends = (0, *np.cumsum(options, dtype=int), outputs)  # options: the widths of all parts but the last
        dzs = [dy[:, start:end] for start, end in itertools.pairwise(ends)]
        numbers = *plain_loops.statistics(y), data("gamma", (outputs,)), data("beta", (outputs,)), 1e-3
        if case.name == "conv_bn_relu":
            return x, weight, window, *numbers
        return dzs, x, weight, window, y, *numbers, True
    return {
        "conv2d_statistics": lambda: (x, weight, window),
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
    by_loops = np.prod(case.shape) < 10_000 or case.name not in (*WINDOWED, *FUSED)
    return as_tuple(function_of(plain_loops, case.name)(*arguments(case)) if by_loops else by_shifts(case))


def function_of(module: Any, name: str) -> Callable[..., Any]:
    """A kernel by name; max_pool_dx as a function of x, by way of the module's own winners; move_running as one that
    returns copies."""
    if name == "max_pool_dx":
        return lambda dy, x, window: module.max_pool_dx(dy, module.max_pool_winners(x, window)[1], window)
    if name == "move_running":
        return functools.partial(moved_copies, module)
    return getattr(module, name)  # type: ignore[no-any-return]


def moved_copies(module: Any, running_mean: Array, running_var: Array, *rest: Any) -> tuple[Array, Array]:
    copies = running_mean.copy(), running_var.copy()
    module.move_running(*copies, *rest)
    return copies


def scale_of(case: Case) -> float:
    """What the errors of a case's results are measured by, where that is not each result's own largest value."""
    if case.name == "cross_entropy":
        return PROBABILITY
    return 0.0


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

    names = inspect.signature(getattr(plain_loops, name)).parameters
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
    results = as_tuple(function_of(k, name)(*args))
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
    pytest.param("numpy", "textbook", id="textbook"),
    pytest.param("fake_cupy", "table", id="fake_cupy"),
    pytest.param("fake_cupy", "textbook", id="textbook on fake_cupy"),
    pytest.param("cupy", "table", id="cupy", marks=pytest.mark.gpu),
    pytest.param("fake_cupy", "reversed", id="fake_cupy reversed"),
    pytest.param("cupy", "textbook", id="textbook on cupy", marks=pytest.mark.gpu),
]
on_every_backend = pytest.mark.parametrize(("xp", "k"), BACKENDS, indirect=True)


# ---- One of each kernel, and sizes at which the fast ones split images, or bands of rows ----

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
    Case("move_running", options=(0.1,)),
    *(Case("batch_norm", options=(1e-5, relu)) for relu in (True, False)),
    *(Case("batch_norm_dx", options=(1e-5, relu, thr)) for relu in (True, False) for thr in (True, False)),
    *(Case(name, options=(3, 0.5, 0.75, 1.0)) for name in ("lrn", "lrn_dx")),
    Case("cross_entropy", (7, 10), options=(1.0, 0.1)),
    Case("matmul"),
    Case("concat", options=(3, 1, 5)),
    Case("add"),
    *(Case("dropout", options=(0.4, named)) for named in (True, False)),
]


LARGE = [
    *(
        Case(name, shape, kernel, stride, kernel // 2, filters=filters)
        for name in FUSED
        for shape, kernel, stride, filters in (
            ((67, 32, 14, 14), 3, 1, 16),
            ((1, 16, 131, 127), 3, 1, 24),  # bands of rows
            ((19, 16, 29, 29), 3, 2, 24),
            ((29, 64, 28, 28), 1, 1, 32),
            ((67, 32, 14, 14), 3, 1, 40),  # Winograd's way, as the next two
            ((13, 48, 14, 14), 3, 1, 56),
            ((5, 40, 20, 20), 5, 1, 64),
        )
    ),
    Case("conv_bn_relu_backward", (29, 64, 28, 28), 1, options=(8, 17), filters=40),  # three units on one input
    # One block of many filters, that are cut; in the second, filters are longer than there are pixels.
    *(Case(name, (1, c, 14, 14), 1, filters=385) for name in ("conv2d", "conv_bn_relu") for c in (150, 256)),
    *(
        Case(name, shape, kernel, stride, padding, filters=filters)
        for name in CONVOLUTIONS
        for shape, kernel, stride, padding, filters in (
            ((1, 16, 131, 127), 3, 1, 1, 24),  # one large image: bands of rows
            ((1, 3, 224, 224), 7, 2, 3, 16),  # a stem
            ((67, 32, 14, 14), 3, 1, 1, 16),  # many images and a rest
            ((67, 32, 14, 14), 3, 1, 1, 40),  # the same, Winograd's way
            ((211, 24, 7, 7), 5, 1, 2, 16),
            ((29, 64, 28, 28), 1, 1, 0, 32),  # the pixel matrix itself
            ((19, 16, 29, 29), 3, 2, 0, 24),
            ((9, 16, 33, 31), (1, 7), 1, (0, 3), 16),
            ((1, 48, 67, 61), 3, 1, 1, 64),  # many channels: Winograd's, here in bands of rows of tiles
            ((37, 56, 13, 14), 3, 1, 0, 48),
            ((3, 48, 31, 30), 5, 1, 1, 64),
            ((1, 48, 8, 600), 3, 1, 8, 48),  # bands of nothing but padding
            ((1, 256, 4, 200), 1, 1, 8, 8),
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
    *(
        Case("dropout", shape, options=(0.7, named))
        for shape in ((131, 1024), (3, 40, 28, 28))
        for named in (True, False)
    ),
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

    def conv2d(x: Array, weight: Array, bias: Array) -> Array:
        return (np.tensordot(windows(x, 0), weight, ((1, 4, 5), (1, 2, 3))) + bias).transpose(0, 3, 1, 2)

    def conv2d_dx(dy: Array, weight: Array) -> Array:
        by_pixel = dy.transpose(0, 2, 3, 1)
        return spread(lambda u, v: (by_pixel @ weight[:, :, u, v]).transpose(0, 3, 1, 2), len(dy), weight.shape[1])

    def conv2d_dw(dy: Array, x: Array) -> tuple[Array, Array]:
        return np.tensordot(dy, windows(x, 0), ((0, 2, 3), (0, 2, 3))), dy.sum((0, 2, 3))

    if name == "conv2d":
        return (conv2d(*args[:3]),)
    if name == "conv2d_dx":
        return (conv2d_dx(*args[:2]),)
    if name == "conv2d_dw":
        return conv2d_dw(*args[:2])
    if name == "conv2d_backward":
        dy, x, weight = args[:3]
        return conv2d_dx(dy, weight), *conv2d_dw(dy, x)
    if name == "conv_bn_relu":
        x, weight, _, *rest = args
        return (plain_loops.batch_norm(conv2d(x, weight, np.zeros(len(weight))), *rest, True),)
    if name == "conv2d_statistics":
        y = conv2d(*args[:2], np.zeros(len(args[1])))
        return y, y.mean((0, 2, 3)), y.var((0, 2, 3))
    if name == "conv_bn_relu_backward":
        dzs, x, weight, _, *rest = args
        dy, dgamma, dbeta = plain_loops.batch_norm_dx(np.concatenate(dzs, 1), *rest[:6], True, True)
        return conv2d_dx(dy, weight), conv2d_dw(dy, x)[0], dgamma, dbeta
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
