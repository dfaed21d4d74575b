"""The parts of `--backend cupy`: what each measures, within which time, and how it is printed.

ours_gpu.py and torch_peers.py hold the networks, gpu_profile.py and trace.py take a step apart; they run in processes
of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.processes import start_each
from benchmarks.tables import Found, medians, print_compare, print_kernels, print_layers, products_in, table
from benchmarks.vocabulary import CONTENDERS, GPU, MEASURES, Failed, Job, Record, Workload
from minigrad.backend import PRECISIONS, cupy_status, default_module, first_line

# The limit of each part; what was measured by then is kept.
SECONDS = {"environment": 10, "ceilings": 20, "compare": 200, "profile": 90}
PARTS = tuple(SECONDS)
BATCH = 128


def measure(
    args: argparse.Namespace,
    parts: tuple[str, ...],
    works: dict[str, Workload],
    keep: Callable[[str, Any, float], None],
) -> None:
    """Measure, print and keep each part. A part that fails prints why, and the others go on.

    keep   is called with a part, what has been found so far and the moment when the part began
    """
    torch = torch_here()
    precisions = [args.precision] if args.precision else list(PRECISIONS)
    whos = [
        who
        for who, contender in GPU.items()
        if contender.precision in (*precisions, *(["bf16"] if args.precision != "float32" else []))
        and (contender.ours or torch.get("gpu"))
    ]
    if not torch.get("gpu"):
        print(f"nothing to compare with: {torch['why']}")
    for part in parts:
        started = time.perf_counter()
        print(f"\n{part}\n", flush=True)

        def keep_part(found: Any, part: str = part, started: float = started) -> None:
            keep(part, found, started)

        try:
            if part == "environment":
                keep_part(environment(args, torch))
            elif part == "ceilings":
                work = next(iter(works.values()))
                repeats = 1 if args.quick else 3
                job = Job("ours_float32", [work], [1], ["ceilings"], repeats, True, args.device)
                for row in attempt([job], started + SECONDS[part]):
                    keep_part(row)
                    print_ceilings(row)
            elif part == "compare":
                wanted = [who for who in whos if who in (args.who or whos)]
                print_compare(compare_on_gpu(works, wanted, args, keep_part))
            else:
                profile_on_gpu(works, whos, args, keep_part)
        except Exception as error:  # the parts after it must not be lost
            keep_part({"failed": first_line(error)})
            print(f"{part} failed: {first_line(error)}")


def attempt(jobs: list[Job], end: float) -> list[Record]:
    """The records of the jobs that succeed before the moment `end`; a sentence is printed for each other job."""
    found: list[Record] = []
    for job, result in start_each(jobs, max(end - time.perf_counter(), 10)):
        if isinstance(result, Failed):
            print(f"{' and '.join(job.measures)}: {result}")
        else:
            found += result
    return found


def torch_here() -> Record:
    """Versions of PyTorch and its libraries, and whether it has a GPU; from another process, since it takes memory."""
    ask = (
        "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps({'version': torch.__version__, "
        "'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version(), 'gpu': gpu}))"
    )
    if not importlib.util.find_spec("torch"):
        return {"why": "PyTorch is not installed"}
    try:
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
        found: Record = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return {"why": "PyTorch is installed but does not import"}
    return found if found["gpu"] else found | {"why": f"PyTorch {found['version']} is installed but finds no GPU"}


def properties_of(device: int) -> Record:
    cupy: Any = default_module()
    properties: Record = cupy.cuda.runtime.getDeviceProperties(device)
    return properties


def name_of(device: int) -> str:
    name: str = properties_of(device)["name"].decode()
    return name


def environment(args: argparse.Namespace, torch: Record) -> Record:
    """The GPU and its software, as CUDA, CuPy and nvidia-smi describe them."""
    cupy: Any = default_module()
    runtime, status, properties = cupy.cuda.runtime, cupy_status(device=args.device), properties_of(args.device)
    found: Record = {
        "cupy_status": list(status),
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties.get("multiProcessorCount"),
        "memory_gb": runtime.memGetInfo()[1] / 1e9,
        "driver_cuda": runtime.driverGetVersion(),
        "runtime_cuda": runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "torch": torch,
    }
    asked = "driver_version,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu,utilization.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={args.device}", f"--query-gpu={asked}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        found["nvidia_smi"] = dict(zip(asked.split(","), done.stdout.strip().split(", "), strict=False))
    except (OSError, subprocess.TimeoutExpired):
        found["nvidia_smi"] = "there is no nvidia-smi"
    for key, value in found.items():
        print(f"{key}: {value}")
    return found


def print_ceilings(found: Record) -> None:
    print(f"copying: {found['copy_gb_per_second']:,.0f} GB/s, read and written")
    rows: list[tuple] = [(f"{r['n']}³", r["precision"], f"{r['tflops']:.1f}") for r in found["products"]]
    table("product|precision|TFLOP/s", rows, 2)
    table("to start|µs of the host", [(name, f"{us:.1f}") for name, us in found["host_us"].items()], 1)


def compare_on_gpu(
    works: dict[str, Workload], whos: list[str], args: argparse.Namespace, keep: Callable[[Any], None]
) -> list[Record]:
    """The rows of `compare`. A round is a process for ours and one for PyTorch's, each with all its networks."""
    before: list[Record] = []
    repeats = 1 if args.quick else 3
    for name, work in works.items():
        found: Found = {}
        left, started = list(whos), time.perf_counter()
        seconds = SECONDS["compare"] / len(works)
        for done in range(args.rounds or repeats):
            spent = time.perf_counter() - started
            if done and spent * (done + 1) / done > seconds:
                print(f"{name}: {done} rounds, since another would end after the limit of {seconds:.0f} seconds")
                break
            for ours in (True, False):
                names = [who for who in left if CONTENDERS[who].ours is ours]
                jobs = [Job(who, [work], [1], list(MEASURES), repeats, True, args.device) for who in names]
                for job, result in start_each(jobs, max(seconds - (time.perf_counter() - started), 30)):
                    if isinstance(result, Failed):
                        print(f"left out: {result}")
                        left.remove(job.who)
                        continue
                    for record in result:
                        found.setdefault((record["measure"], job.who), []).append(record)
            keep(before + medians(name, work, found))
        before += medians(name, work, found)
    return before


def profile_on_gpu(
    works: dict[str, Workload], whos: list[str], args: argparse.Namespace, keep: Callable[[Any], None]
) -> None:
    """minigrad by `gpu_profile`; where PyTorch is installed, its profiler sees minigrad and its own fastest network."""
    repeats = 1 if args.quick else 3
    precision = args.precision or "tf32"
    ours, theirs = f"ours_{precision}", f"torch_channels_last_{precision}"
    found: Record = {}
    end = time.perf_counter() + SECONDS["profile"]
    for name, work in works.items():
        for row in attempt([Job(ours, [work], [1], ["profile"], repeats, True, args.device)], end):
            found[name] = row
            keep(found)
            print_gpu_profile(name, row)
        if theirs not in whos or name not in found:
            continue
        traces: dict[str, Record] = {}
        for who in (ours, theirs):
            jobs = [Job(who, [work], [1], ["trace"], repeats, True, args.device)]
            traces |= {row["who"]: row for row in attempt(jobs, end)}
        found[name]["traces"] = traces
        keep(found)
        for who, row in traces.items():
            print(
                f"{name}, {CONTENDERS[who].title}, by PyTorch's profiler: {row['launches']:.0f} launches, "
                f"{row['copies']:.0f} copies, the GPU is busy for {row['busy_ms']:.2f} ms\n"
            )
            rows = [(r["name"][:90], f"{r['launches']:.0f}", f"{r['ms']:.3f}") for r in row["kernels"][:12]]
            table("kernel|launches|ms", rows, 1)


def print_gpu_profile(name: str, p: Record) -> None:
    bound = "the GPU waits for the host" if p["host_ms"] > p["device_ms"] else "the GPU takes the time"
    print(
        f"{name}, batch {p['batch']}, {CONTENDERS[p['who']].title}: step {p['step_ms']:.2f} ms, the GPU needs "
        f"{p['device_ms']:.2f} and the host {p['host_ms']:.2f} to launch it: {bound}; "
        f"{p['launches_per_step']} launches, CuPy's own not counted\n"
    )
    print_kernels("kernel|launches|ms|share|", p, 3)
    rows: list[tuple] = []
    for r in p["launches"][:24]:
        rate = f"{r['gflops']:,.0f} GFLOP/s" if r["flop"] else f"{r['gb_per_second']:,.0f} GB/s" if r["mb"] else ""
        of = f"{r['gb_per_second'] / p['copy_gb_per_second']:.0%}" if r["mb"] and not r["flop"] else ""
        rows.append((r["kernel"], r["sizes"], r["calls"], f"{r['ms']:.4f}", f"{r['calls'] * r['ms']:.3f}", rate, of))
    table("launch|sizes|calls|ms each|ms|alone|of a copy's", rows, 2)
    print_layers("layer, with a wait after every op|forward ms|backward ms", p, 2)
    print(f"{products_in(p)} of {p['device_ms']:.2f}\n")
