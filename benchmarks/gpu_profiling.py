"""What is measured on a GPU beside whole steps: its ceilings, and where a step's time goes.

A launch is timed by CUDA events around several of it, behind copies that keep the GPU busy until the host has told it
of all of them: otherwise a short kernel's time would be the host's.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import Form, Job, Record, steady_times
from benchmarks.ours import OnGpu
from benchmarks.profiling import layer_rows, replaced
from minigrad import set_backend, set_precision, summary
from minigrad.backend import default_module
from minigrad.kernels.cuda import conv, cublas, dense, norm, optim, pictures, pool
from minigrad.kernels.cuda.launch import launch

AGAIN = 10  # launches between two events, where they are not to be quick
HELD = 3.0  # milliseconds for which the GPU is kept busy while the host tells it of them


class Clock:
    """Milliseconds of the GPU's own time."""

    def __init__(self, quick: bool, megabytes: int):
        self.cupy: Any = default_module()
        self.again, megabytes = (1, 4) if quick else (AGAIN, megabytes)
        self.ballast = self.cupy.zeros((2, megabytes * 2**18), np.float32)
        self.copy()
        one = self.between(lambda: self.repeat(self.copy)) / self.again
        self.copy_gb_per_second = self.ballast.nbytes / max(one, 1e-6) / 1e6  # read and written
        self.copy_ms = one

    def copy(self) -> None:
        self.cupy.copyto(self.ballast[1], self.ballast[0])

    def between(self, call: Callable[[], Any]) -> float:
        """From the start to the end of what `call` starts."""
        first, last = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        first.record()
        call()
        last.record()
        last.synchronize()
        return self.cupy.cuda.get_elapsed_time(first, last)

    def held(self, call: Callable[[], Any], ms: float = HELD) -> float:
        """The same where the GPU has been told everything before it starts."""
        for _ in range(min(200, math.ceil(ms / max(self.copy_ms, 1e-3)))):
            self.copy()
        return self.between(call)

    def of(self, call: Callable[[], Any]) -> float:
        """Of one such call, its operands in the GPU's cache if they fit."""
        call()
        return self.held(lambda: self.repeat(call)) / self.again

    def repeat(self, call: Callable[[], Any]) -> None:
        for _ in range(self.again):
            call()


# --- ceilings


def ceilings(job: Job) -> Record:
    """How fast this GPU copies, and multiplies large matrices; and what it costs the host to tell it of a launch."""
    set_backend("cupy", job.device)
    quick = job.repeats == 1
    clock = Clock(quick, 512)
    cupy = clock.cupy
    found: Record = {"copy_gb_per_second": clock.copy_gb_per_second, "products": []}
    for n in (64,) if quick else (1024, 4096, 8192):
        a, b, out = (cupy.ones((n, n), np.float32) for _ in range(3))
        for precision in ("float32", "tf32"):
            set_precision(precision)
            ms = clock.of(functools.partial(cublas.product, a, b, out))
            found["products"].append({"n": n, "precision": precision, "tflops": 2 * n**3 / ms / 1e9})
    a, b, out = (cupy.ones((32, 32), np.float32) for _ in range(3))
    calls = {
        "a kernel of ours": lambda: launch("dense", "add_bias", a, 32, 32, a, b[0], 32, 32),
        "a product": lambda: cublas.product(a, b, out),
        "a function of CuPy, into an array": lambda: cupy.add(a, b, out=out),
        "an operator of CuPy": lambda: a + b,
    }
    found["host_us"] = {name: host_us(call, cupy, 10 if quick else 200) for name, call in calls.items()}
    return found


def host_us(call: Callable[[], Any], cupy: Any, count: int) -> float:
    """Microseconds of the host for one call, of few enough that the GPU's queue does not fill."""
    times = []
    for _ in range(5):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count * 1e6)
    cupy.cuda.Device().synchronize()
    return statistics.median(times)


# --- profile


def profile(job: Job) -> Record:
    """Where a training step's time goes. Milliseconds are per step.

    step_ms     among many steps; host_ms: of it, until the host has told of all launches; device_ms: what the GPU
                needs where it need not wait for the host
    kernels     by name; "else" is what the doors below do not see: CuPy's own functions, and gaps between launches
    launches    each form of each kernel, the slowest first: MB of its operands, and GB/s or GFLOP/s
    """
    assert job.device is not None
    (work,) = job.works
    network = OnGpu(work, job.device, Form.of(job.who).precision)
    step, host = (1e3 * seconds for seconds in steady_times(network.step, network, job.repeats))
    clock = Clock(job.repeats == 1, 256)
    device = clock.held(network.step, 1.5 * host)
    result = {"who": job.who, **work._asdict(), "step_ms": step, "host_ms": host, "device_ms": device}
    result["copy_gb_per_second"] = clock.copy_gb_per_second
    result["layers"] = layer_rows(network, 1 if job.repeats == 1 else 3)
    result["launches"] = rows = launch_rows(network, clock)
    kernels: dict[str, Record] = defaultdict(lambda: {"calls": 0, "ms": 0.0})
    for row in rows:
        kernels[row["kernel"]]["calls"] += row["calls"]
        kernels[row["kernel"]]["ms"] += row["calls"] * row["ms"]
    told = sum(kernel["ms"] for kernel in kernels.values())
    result["launches_per_step"] = sum(kernel["calls"] for kernel in kernels.values())
    kernels["else"] = {"calls": 0, "ms": max(0.0, device - told)}
    total = max(device, told)
    by_time = sorted(kernels.items(), key=lambda item: -item[1]["ms"])
    result["kernels"] = [{"name": name} | kernel | {"share": kernel["ms"] / total} for name, kernel in by_time]
    products = [row for row in rows if row["kernel"] == "product"]
    flop, ms = (sum(row["calls"] * row[key] for row in products) for key in ("flop", "ms"))
    nominal = summary(network.model, (3, work.size, work.size)).multiply_adds * work.batch
    return result | {
        "products_share": ms / total,
        "multiply_adds": flop / 2,
        "forward_multiply_adds": nominal,
        "gflops": flop / step / 1e6,
        "gflops_alone": flop / ms / 1e6,
        "products_alone_ms": ms,
    }


# What starts kernels and products of ours; CuPy's own functions start theirs unseen.
DOORS: list[tuple[Any, str]] = [
    *((room, "launch") for room in (conv, norm, pool, dense, pictures, optim)),
    *((room, "product") for room in (conv, dense)),
]


def launch_rows(network: OnGpu, clock: Clock) -> list[Record]:
    """Every form of every launch of a step, timed where it occurs; what it does to the weights by that is no matter."""
    rows: dict[Any, Record] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            kernel, like = (args[1], args[5:]) if name == "launch" else (name, args)
            arrays = [a for a in like if hasattr(a, "nbytes")]
            key = kernel, *((a.shape, a.strides) for a in arrays), *(a for a in like if isinstance(a, int))
            if key not in rows:
                row: Record = {"kernel": kernel, "sizes": size_of(name, args), "calls": 0, "flop": 0}
                row["ms"] = ms = clock.of(functools.partial(function, *args, **options))
                row["mb"] = sum(a.nbytes for a in arrays) / 1e6
                row["gb_per_second"] = row["mb"] / max(ms, 1e-6)
                if name == "product":
                    row["flop"] = 2 * math.prod(args[2].shape) * args[0].shape[-1]
                    row["gflops"] = row["flop"] / max(ms, 1e-6) / 1e6
                elif args[0] == "optim":  # its operands are tables of addresses
                    row["mb"] = row["gb_per_second"] = None
                rows[key] = row
            rows[key]["calls"] += 1
            return result

        return run

    with replaced(DOORS, timed):
        network.step()
    return sorted(rows.values(), key=lambda row: -row["calls"] * row["ms"])


def size_of(name: str, args: tuple[Any, ...]) -> str:
    if name == "product":
        return f"{args[0].shape}·{args[1].shape}"
    rows, columns = args[3:5]
    return f"{rows}×{columns}"
