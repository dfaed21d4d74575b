"""Where a training step's time goes on the CPU: to which kernels, layers and matrix products.

The kernels are the functions of the kernel table, `minigrad.kernels`, in whatever module computes with NumPy arrays.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.clock import median_time
from benchmarks.ours import Ours, use_kernels
from benchmarks.vocabulary import Record, Workload
from minigrad import layer_times, summary
from minigrad.kernels import kernels

BLOCK_ROWS = 8192  # of the products that are timed alone


def profile(work: Workload, threads: int, steps: int, kernel_module: str = "") -> Record:
    """Everything that this file measures of a workload. Milliseconds are per step."""
    use_kernels(kernel_module)
    network = Ours(work)
    network.set_threads(threads)
    step_ms = median_time(network.step, steps) * 1e3
    calls, total_ms = kernel_calls(network, steps)
    forward = summary(network.model, (3, work.size, work.size)).multiply_adds * work.batch
    return {
        **work._asdict(),
        "threads": threads,
        "step_ms": step_ms,
        "module": table_module().__name__,
        "kernels": kernel_rows(calls, steps, total_ms),
        "layers": layer_rows(network, steps),
        **product_rows(calls, steps, threads),
        "forward_multiply_adds": forward,
    }


@contextmanager
def replaced(places: list[tuple[Any, str]], wrap: Callable[[str, Any], Any]) -> Iterator[None]:
    """Within the block, every attribute (object, name) is wrap(name, its value)."""
    with ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, wrap(name, getattr(place, name))))
        yield


def layer_rows(network: Ours, steps: int) -> list[Record]:
    """The times of the model's direct children, in their order, and of the loss. The update is not a layer."""
    with layer_times(network.model, depth=1) as times:
        for _ in range(steps):
            network.step()
    return [{"name": row.path, "forward_ms": row.forward, "backward_ms": row.backward} for row in times.rows]


# --- kernels


class Product(NamedTuple):
    """A matrix product (m, k)·(k, n), as the definition of a convolution or a linear layer needs it."""

    m: int
    k: int
    n: int


class Call(NamedTuple):
    name: str
    ms: float
    values: int  # of the largest array, or list of arrays, among arguments and results
    product: Product | None
    times: int  # how many products of this size: one forward, one for each gradient


def table_module() -> ModuleType:
    return kernels(np.zeros(1, np.float32))


def table_functions(module: ModuleType) -> list[str]:
    """The public functions of a kernel module."""
    public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    return [name for name in public if callable(getattr(module, name)) and not inspect.isclass(getattr(module, name))]


def kernel_calls(network: Ours, steps: int) -> tuple[list[Call], float]:
    """Every call of a kernel, and of the update, in so many steps; and the milliseconds of all steps together.

    A kernel that another kernel calls is part of the outer one.
    """
    calls: list[Call] = []
    inside = False

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            nonlocal inside
            if inside or threading.current_thread() is not threading.main_thread():
                return function(*args, **options)
            inside, start = True, time.perf_counter()
            try:
                result = function(*args, **options)
            finally:
                ms = (time.perf_counter() - start) * 1e3
                inside = False
            given = signature.bind(*args, **options).arguments
            values = max([size(value) for value in [*given.values(), *as_list(result)]], default=0)
            calls.append(Call(name, ms, values, *product_of(name, given, result)))
            return result

        return run

    module = table_module()
    with replaced([(module, name) for name in table_functions(module)] + [(network, "update")], timed):
        start = time.perf_counter()
        for _ in range(steps):
            network.step()
        return calls, (time.perf_counter() - start) * 1e3


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def size(value: Any) -> int:
    return sum(array.size for array in as_list(value) if isinstance(array, np.ndarray))


def product_of(name: str, given: Record, result: Any) -> tuple[Product | None, int]:
    """The products of a kernel's call by its definition: their size, and how many there are. Arguments are found by
    the names that the kernel table gives them."""
    if name == "matmul":
        a, b = given["a"], given["b"]
        stacked = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
        return Product(a.shape[-2], a.shape[-1], b.shape[-1]), stacked
    if not name.startswith("conv"):
        return None, 0
    window, backward = given["window"], "backward" in name or name in ("conv2d_dx", "conv2d_dw")
    y = (given["y"] if "y" in given else given["dy"]) if backward else as_list(result)[0]
    pictures, outputs, height, width = y.shape
    channels = given["weight"].shape[1] if "weight" in given else given["x"].shape[1]
    gradients = given.get("needs_dx", True) + given.get("needs_dw", True)
    return (
        Product(pictures * height * width, channels * math.prod(window.kernel), outputs),
        gradients if "backward" in name else 1,
    )


def kernel_rows(calls: list[Call], steps: int, total_ms: float) -> list[Record]:
    """The kernels by their time, then the rest: Python, small arrays, sums of gradients. `ns`: per value of the largest
    array, in kernels without products; `gflops`: by the definition, in kernels with products."""
    by_name: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_name[call.name].append(call)
    rows: list[Record] = []
    for name, some in by_name.items():
        ms, values = sum(call.ms for call in some), sum(call.values for call in some)
        flop = 2 * sum(call.times * math.prod(call.product) for call in some if call.product)
        rows.append({"name": name, "calls": len(some) // steps, "ms": ms / steps})
        if flop:
            rows[-1]["gflops"] = flop / ms / 1e6
        elif values:
            rows[-1]["ns"] = ms * 1e6 / values
    rows.sort(key=lambda row: -row["ms"])
    rest = total_ms / steps - sum(row["ms"] for row in rows)
    rows.append({"name": "outside kernels", "calls": 0, "ms": rest})
    return [row | {"share": row["ms"] / (total_ms / steps)} for row in rows]


# --- matrix products


def product_rows(calls: list[Call], steps: int, threads: int) -> Record:
    """The kernels with products by their sizes, and the time that np.matmul takes for the same products alone.

    gflops         2·m·k·n over the kernel's time. The kernel does more than multiply; Winograd's form multiplies less
    gflops_alone   of all threads, each with a product of its own, operands in the cache
    """
    by_size: dict[tuple[str, Product, int], list[float]] = defaultdict(list)
    for call in calls:
        if call.product:
            by_size[call.name, call.product, call.times].append(call.ms)
    rates = {product: alone(product, threads) for product in {product for _, product, _ in by_size}}
    rows: list[Record] = []
    for (name, product, count), times in by_size.items():
        adds, ms = len(times) / steps * count * math.prod(product), sum(times) / steps
        rows.append({"function": name, "count": count, **product._asdict(), "calls": len(times) / steps, "ms": ms})
        rows[-1] |= {"multiply_adds": adds, "gflops": 2 * adds / ms / 1e6, "gflops_alone": rates[product] / 1e9}
    rows.sort(key=lambda row: -row["ms"])
    alone_ms = sum(2 * row["multiply_adds"] / row["gflops_alone"] / 1e6 for row in rows)
    adds = sum(row["multiply_adds"] for row in rows)
    return {
        "products": rows,
        "multiply_adds": adds,
        "products_alone_ms": alone_ms,
        "gflops_alone": 2 * adds / alone_ms / 1e6 if rows else 0.0,
    }


def alone(product: Product, threads: int, least: float = 0.003) -> float:
    """Floating-point operations a second of such products in blocks of rows, on all threads at once: the best of three
    rounds, in each of which every thread multiplies for `least` seconds, once at least."""
    m = min(product.m, BLOCK_ROWS)

    def seconds(_: int) -> float:
        a, b = np.ones((m, product.k), np.float32), np.ones((product.k, product.n), np.float32)
        out = a @ b
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < least:
            np.matmul(a, b, out=out)
            count += 1
        return (time.perf_counter() - start) / count

    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        best = min(max(pool.map(seconds, range(threads))) for _ in range(3))
    return threads * 2 * m * product.k * product.n / best
