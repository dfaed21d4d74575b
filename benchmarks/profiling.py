"""Where a step's time goes: to which kernels, to which layers, and how fast its matrix products run there and alone."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.measure import Record, Workload, median_time
from benchmarks.ours import Ours
from minigrad import layer_times, summary
from minigrad.kernels import numpy_
from minigrad.kernels.numpy_ import conv
from minigrad.threads import blas_on_one_thread, each


def profile(work: Workload, threads: int, steps: int) -> Record:
    """Everything this file tells about a workload. Milliseconds are per step."""
    network = Ours(work)
    network.set_threads(threads)
    plain = median_time(network.step, steps)
    result = {**work._asdict(), "threads": threads, "step_ms": plain * 1e3}
    result["kernels"] = kernel_times(network, steps)
    result["layers"] = layer_rows(network, steps)
    nominal = summary(network.model, (3, work.size, work.size)).multiply_adds * work.batch
    return result | product_times(network, steps, threads, plain) | {"forward_multiply_adds": nominal}


@contextmanager
def replaced(places: list[tuple[Any, str]], wrap: Callable[[str, Any], Any]) -> Iterator[None]:
    """Within the block, every (module, name) is wrap(name, what it was)."""
    with ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, wrap(name, getattr(place, name))))
        yield


# --- kernels


def kernel_times(network: Ours, steps: int) -> list[Record]:
    """The functions of the kernel table; one inside another counts as part of the outer one. Then the update, and what
    is left: Python, small arrays, gradients that are kept."""
    table = numpy_.__all__
    calls: dict[str, list[float]] = defaultdict(list)
    inside = False

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            nonlocal inside
            if inside or threading.current_thread() is not threading.main_thread():
                return function(*args)
            inside, start = True, time.perf_counter()
            try:
                return function(*args)
            finally:
                calls[name].append(time.perf_counter() - start)
                inside = False

        return run

    with replaced([(numpy_, name) for name in table] + [(network, "update")], timed):
        start = time.perf_counter()
        for _ in range(steps):
            network.step()
        total = time.perf_counter() - start
    rows: list[Record] = [{"name": n, "calls": len(t) // steps, "ms": sum(t) / steps * 1e3} for n, t in calls.items()]
    rows.sort(key=lambda row: -row["ms"])
    rest = total / steps * 1e3 - sum(row["ms"] for row in rows)
    rows.append({"name": "outside kernels", "calls": 0, "ms": rest})
    return [row | {"share": row["ms"] / (total / steps * 1e3)} for row in rows]


def layer_rows(network: Ours, steps: int) -> list[Record]:
    """What the model's direct children take, in their order, and the loss. The update is no layer."""
    with layer_times(network.model, depth=1) as times:
        for _ in range(steps):
            network.step()
    return [{"name": row.path, "forward_ms": row.forward, "backward_ms": row.backward} for row in times.rows]


# --- matrix products


class Product(NamedTuple):
    """One form of a product: enough to do it again on other numbers."""

    function: str
    operands: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...]  # shape, strides, dtype of each

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(count, M, K, N): so many products (M, K) · (K, N)."""
        (a, *_), (b, *_) = self.operands[:2]
        if self.function == "product_of_transposed":
            return 1, a[1], a[0], b[1]
        batch = np.broadcast_shapes(a[:-2], b[:-2])
        return int(np.prod(batch, dtype=int)), a[-2], a[-1], b[-1]

    @property
    def multiply_adds(self) -> int:
        return int(np.prod(self.sizes))


# The doors to BLAS; a call of one from another is part of the outer one. Winograd's transforms are products, too. Sums
# of columns, which are products with ones, and the few products written with @ (Winograd's gradients of filters, for
# example) count as other work.
DOORS: list[tuple[Any, str]] = [(conv, "product"), (conv, "product_of_transposed"), (np, "matmul")]


def product_times(network: Ours, steps: int, threads: int, step_seconds: float) -> Record:
    """Every product of a step, and the same products alone.

    share    of the time of all threads in a step
    alone    the same shapes and strides, each again and again on all threads at once, operands in the cache
    """
    recorded: list[tuple[Product, float]] = []
    busy = threading.local()
    plain = {name: getattr(place, name) for place, name in DOORS}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if getattr(busy, "now", False):
                return function(*args, **options)
            busy.now, start = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds = time.perf_counter() - start
                busy.now = False
                arrays = [*args, *([options["out"]] if options.get("out") is not None else [])]
                recorded.append((Product(name, tuple((a.shape, a.strides, a.dtype.str) for a in arrays)), seconds))

        return run

    with replaced(DOORS, timed):
        for _ in range(steps):
            network.step()
    seconds: dict[Product, list[float]] = defaultdict(list)
    for product, spent in recorded:
        seconds[product].append(spent)
    rows = []
    for product, times in seconds.items():
        calls, flop = len(times) / steps, 2 * product.multiply_adds
        alone = replay(product, plain, threads)
        row: Record = dict(zip(("count", "m", "k", "n"), product.sizes, strict=True))
        row |= {"function": product.function, "calls": calls, "ms": sum(times) / steps * 1e3}
        rows.append(row | {"alone_ms": calls * alone * 1e3, "multiply_adds": calls * product.multiply_adds})
        rows[-1] |= {"gflops": flop * len(times) / sum(times) / 1e9, "gflops_alone": flop / alone / 1e9}
    rows.sort(key=lambda row: -row["ms"])
    ms, alone_ms, executed = (sum(row[key] for row in rows) for key in ("ms", "alone_ms", "multiply_adds"))
    return {
        "products": rows,
        "products_share": ms / (step_seconds * 1e3 * threads),
        "multiply_adds": executed,
        "gflops": threads * 2 * executed / ms / 1e6,
        "gflops_alone": threads * 2 * executed / alone_ms / 1e6,
        "products_alone_ms": alone_ms / threads,
    }


def replay(product: Product, functions: dict[str, Callable[..., Any]], threads: int, least: float = 0.003) -> float:
    """Seconds of one such product, when every thread does nothing else: the fastest of three rounds, which take
    `least` seconds or one product."""
    function = functions[product.function]
    operands = [[like(*operand) for operand in product.operands] for _ in range(threads)]
    times = []

    def work(arrays: list[np.ndarray]) -> None:
        call = functools.partial(function, *arrays)  # matmul takes `out` by position too
        call()
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < least:
            call()
            count += 1
        times.append(spent / count)

    with blas_on_one_thread():
        for _ in range(3):
            each(work, operands)
    return min(times)


def like(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> np.ndarray:
    """Ones in memory of this form."""
    span = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    memory = np.ones(-(-span // np.dtype(dtype).itemsize), dtype)
    return np.ndarray(shape, dtype, memory, 0, strides)
