"""Measure speed and memory, beside PyTorch if it is installed.

    python -m benchmarks                        compare: step, forward, evaluation, peak memory
    python -m benchmarks profile                where a step's time goes: kernels, layers, matrix products
    python -m benchmarks growth                 time per picture against batch, picture size and threads
    python -m benchmarks memory                 what is kept for backward: by `summary`, and as measured
    python -m benchmarks family                 a training step of every network at its native size, as a Markdown table
    python -m benchmarks --report DIR           all of these, as results.json and pictures in DIR; what is there already
                                                of parts that are not measured now stays

    python -m benchmarks --backend cupy --report DIR        the same program on an NVIDIA GPU, in about ten minutes:
        environment    the GPU, its driver, CUDA, CuPy, PyTorch
        ceilings       how fast this GPU copies and multiplies, what a launch costs the host
        compare        beside PyTorch: both memory formats, float32, TF32, bf16, eager and as CUDA graphs
        profile        where a step's time goes: kernels, launches, layers, and how far the host holds the GPU up
        tests          pytest -m gpu

Every network runs in a process of its own, ours and the peers' in turn, with the same number of threads. A ratio is
our time over the peer's, the median over the rounds: below 1 we are faster. Use a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, Any, BinaryIO

from benchmarks import plots
from benchmarks.measure import (
    GPU_PEERS,
    MEASURES,
    NAMES,
    PEERS,
    WORKLOADS,
    Failed,
    Form,
    Job,
    Record,
    Workload,
    cores,
    installed,
    machine,
    start,
    start_each,
)
from inception.models import create_model, form_of, list_models
from inception.weights import replace_file
from minigrad import set_backend, set_num_threads, summary
from minigrad.backend import BACKENDS, PRECISIONS, cupy_status, default_module, first_line
from minigrad.errors import MinigradError, no_such

PARTS = ("compare", "profile", "growth", "memory", "family")
GPU_PARTS = ("environment", "ceilings", "compare", "profile", "tests")
TITLES = {"evaluate": "evaluation", "forward": "forward", "step": "training step"}
EAGER = ("torch", "torch_channels_last")
NUMBERS = ("seconds", "host_seconds", "mb", "start_mb")
# name -> (model, classes, [(size, batch), …], how many of them with --quick)
GROWTH = {
    "small, batch": ("googlenet_small", 10, [(32, 2**i) for i in range(9)], 4),
    "googlenet, batch": ("googlenet", 1000, [(224, 2**i) for i in range(6)], 2),
    "small, picture size": ("googlenet_small", 10, [(size, 32) for size in (32, 48, 64, 80, 96)], 2),
    "googlenet_bn, picture size": ("googlenet_bn", 1000, [(size, 4) for size in (64, 128, 192, 224, 256, 288)], 2),
}
FAMILY_BATCH = 2  # with 1, batch norm has a single value a channel in inception_v3's head
MINUTES = {"compare": 5, "profile": 1, "growth": 6, "memory": 1, "family": 4}  # on two cores, with PyTorch
# The most that a part on a GPU may take; what has been measured until then is kept.
GPU_SECONDS = {"environment": 20, "ceilings": 30, "compare": 230, "profile": 90, "tests": 200}
GPU_BATCH = 128
TESTS = ["-m", "gpu"]
ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; compare if left out; on a GPU those above"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="numpy", help="cupy: on an NVIDIA GPU")
    parser.add_argument("--device", type=number, metavar="N", help="which GPU, from 0: 0 if left out")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the GPU's products: both if left out")
    parser.add_argument("--no-tests", action="store_true", help="of --backend cupy: without pytest -m gpu")
    parser.add_argument("--workload", choices=[*WORKLOADS], action="append", help="may be repeated")
    parser.add_argument(
        "--models", nargs="+", choices=list_models(), metavar="MODEL", help="of family: all if left out"
    )
    parser.add_argument("--batch", type=positive, help=f"instead of the workload's own, or {FAMILY_BATCH} of family")
    parser.add_argument("--threads", type=positive, default=cores(), help="all cores if left out")
    parser.add_argument("--rounds", type=positive, help="of compare: 3, or 1 with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="tiny batches, one round: does it run? Figures mean little"
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile too, which takes minutes to compile")
    parser.add_argument(
        "--default-malloc", action="store_true", help="PyTorch with the C library's own setting, not minigrad's: slower"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write results.json and pictures there")
    args = parser.parse_args()
    on_gpu = args.backend == "cupy"
    known = GPU_PARTS if on_gpu else PARTS
    if unknown := sorted({*args.parts} - {*known}):
        parser.error(no_such("part on a GPU" if on_gpu else "part", unknown[0], known))
    if not on_gpu and (args.device is not None or args.precision or args.no_tests):
        parser.error("--device, --precision and --no-tests are for --backend cupy")
    parts = args.parts or (known if args.report else ("compare",))
    if args.no_tests:
        parts = tuple(part for part in parts if part != "tests")
    try:
        if on_gpu:
            args.device = args.device or 0
            set_backend("cupy", args.device)  # or say why not
        if args.report:  # before minutes of measuring, not after
            if not on_gpu:
                plots.check()
            args.report.mkdir(parents=True, exist_ok=True)
        results = Results(args)
        minutes = 1 if args.quick else sum(MINUTES[part] for part in parts)
        if on_gpu:
            with also_in(args.report and args.report / "report.txt"):
                print(f"{', '.join(parts)}: {sum(GPU_SECONDS[part] for part in parts) / 60:.0f} min at most")
                measure_gpu_parts(args, parts, results)
                if results.path:
                    print("written:", results.path, *draw(results, args))
        else:
            print(
                f"{', '.join(parts)}: about {minutes} min"
                + ("" if args.compile else "; torch.compile only with --compile")
            )
            measure_parts(args, parts, results)
            if results.path:
                print("written:", results.path, *plots.draw(results.parts, args.report))
    except KeyboardInterrupt:
        print("stopped" + (f"; what was measured is in {results.path}" if args.report else ""), file=sys.stderr)
        return 130
    except (Failed, plots.NoPlots, MinigradError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    return 0


class Both(io.TextIOBase):
    """What is printed, for the eye and for later."""

    def __init__(self, *files: IO[str]):
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


@contextmanager
def also_in(path: Path | None) -> Iterator[None]:
    """Within the block, what is printed goes into a file as well."""
    if path is None:
        yield
        return
    with open(path, "w", encoding="utf-8") as file, redirect_stdout(Both(sys.stdout, file)):
        yield


def draw(results: Results, args: argparse.Namespace) -> list[Path]:
    """The pictures; on a GPU's machine, which is not always one's own, none where matplotlib is absent."""
    try:
        return plots.draw(results.parts, args.report)
    except plots.NoPlots as error:
        print(f"no pictures: {error}")
        return []


def number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a GPU: 0, 1, …")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


class Results:
    """What results.json holds: each part with the conditions under which it was measured. Those of before stay."""

    def __init__(self, args: argparse.Namespace):
        self.path = args.report / "results.json" if args.report else None
        self.parts: Record = {}
        if self.path and self.path.exists():
            try:
                self.parts = json.loads(self.path.read_text(encoding="utf-8"))
                ours = all({"found", "machine", "quick"} <= part.keys() for part in self.parts.values())
            except (ValueError, AttributeError):
                ours = False
            if not ours:
                raise Failed(f"{self.path} was not written by this program: move it away")
        gpu = "" if args.backend == "numpy" else gpu_properties(args.device)["name"].decode()
        self.conditions: Record = {"machine": machine(gpu), "quick": args.quick, "threads": args.threads}
        self.conditions["default_malloc"] = args.default_malloc
        self.suffix = "_gpu" if gpu else ""  # figures of the CPU and of a GPU stand side by side

    def keep(self, part: str, found: Any, started: float) -> None:
        """Write what has been found so far."""
        minutes = round((time.perf_counter() - started) / 60, 1)
        self.parts[part + self.suffix] = self.conditions | {"minutes": minutes, "found": found}
        text = json.dumps(self.parts, indent=1) + "\n"

        def write(file: BinaryIO) -> None:
            file.write(text.encode())

        if self.path:
            replace_file(self.path, write)


def measure_parts(args: argparse.Namespace, parts: tuple[str, ...], results: Results) -> None:
    """Measure, print and keep each part."""
    works = works_of(args)
    whos = [who for who in installed() if who != "torch_compile" or args.compile]
    if whos == ["ours"]:
        print("PyTorch is not installed: nothing to compare with")
    print(" · ".join(f"{key} {value}" for key, value in results.conditions["machine"].items()), end="\n\n")
    found: Any
    for part in parts:
        started = time.perf_counter()
        if part == "compare":
            found = compare(works, whos, args)
            print_compare(found)
        elif part == "profile":
            steps = 1 if args.quick else 3
            jobs = {name: Job("ours", [work], [args.threads], ["profile"], steps) for name, work in works.items()}
            found = {name: start(job)[0] for name, job in jobs.items()}
            print_profile(found)
        elif part == "growth":
            found = growth(whos, args)
            print_growth(found)
        elif part == "memory":
            found = memory(works, whos)
            print_memory(found)
        else:
            found = []
            for row in family(args):
                found.append(row)
                results.keep(part, found, started)
            print()
        results.keep(part, found, started)


def works_of(args: argparse.Namespace, least: int = 1) -> dict[str, Workload]:
    """The workloads that are wanted, at batches of at least so many pictures unless told otherwise."""
    works = {}
    for name in args.workload or ("small", "googlenet"):
        work = WORKLOADS[name]
        batch = max(work.batch // 8, 2) if args.quick else max(work.batch, least)
        works[name] = work._replace(batch=args.batch or batch)
    return works


def table(head: str, rows: list[tuple], left: int) -> None:
    """Print rows under the words of `head`, separated by |: `left` columns to the left, the others to the right."""
    lines = [tuple(head.split("|")), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print()


# --- compare

Found = dict[tuple[str, str], list[Record]]  # (measure, network) -> a record of each round


def compare(works: dict[str, Workload], whos: list[str], args: argparse.Namespace) -> list[Record]:
    """One record for every workload, measure and network: medians over the rounds, and our ratio to it."""
    rows: list[Record] = []
    threads, repeats = args.threads, 1 if args.quick else 3
    for name, work in works.items():
        found: Found = {}
        for _ in range(args.rounds or repeats):
            for who in list(whos):
                try:
                    records = start(Job(who, [work], [threads], list(MEASURES), repeats, not args.default_malloc))
                except Failed as error:
                    if who != "torch_compile":
                        raise
                    print(f"torch.compile does not work here: {error}")
                    whos.remove(who)
                    continue
                for record in records:
                    found.setdefault((record["measure"], who), []).append(record)
        rows += [row | {"threads": threads} for row in medians(name, work, found)]
    return rows


def medians(workload: str, work: Workload, found: Found) -> list[Record]:
    """The rows of a workload. A ratio is to ours of the same precision, and replayed like the peer if that is there."""
    rows: list[Record] = []
    for (measure, who), records in found.items():
        row: Record = {"workload": workload, "batch": work.batch, "measure": measure, "who": who}
        row |= {key: statistics.median(r[key] for r in records) for key in NUMBERS if key in records[0]}
        row |= {"images_per_second": work.batch / row["seconds"], "rounds": [r["seconds"] for r in records]}
        form = Form.of(who)
        counterparts = ["ours"] if who in PEERS else [f"ours_{form.precision}_graph"] * form.graph
        counterparts += [f"ours_{form.precision}"]
        mine = next((name for name in counterparts if (measure, name) in found), None)
        for key in ("seconds", "mb") if mine else ():
            pairs = zip(found[measure, mine or ""], records, strict=False)
            row[f"ratio_{key}"] = statistics.median(ours[key] / other[key] for ours, other in pairs)
        rivals = [
            name
            for of, name in found
            if of == measure and Form.of(name) in [Form(eager, form.precision) for eager in EAGER]
        ]
        best = min(rivals, key=lambda name: statistics.median(r["seconds"] for r in found[measure, name]), default=None)
        rows.append(row | {"best_eager": who == best})
    order = [*reversed(MEASURES)]
    return sorted(rows, key=lambda r: (order.index(r["measure"]), list(NAMES).index(r["who"])))


def print_compare(rows: list[Record]) -> None:
    on_gpu = any("host_seconds" in row for row in rows)
    head = "workload|measure|network|ms|images/s|peak MB|of it before|time ratio|memory ratio|"
    if on_gpu:
        head = head.replace("|peak MB", "|host ms|peak MB")
    lines = []
    for r in rows:
        compared = "ratio_seconds" in r and not Form.of(r["who"]).ours
        ratios = (f"{r['ratio_seconds']:.2f}", f"{r['ratio_mb']:.2f}") if compared else ("", "")
        figures = (
            f"{r['seconds'] * 1e3:.1f}" if not on_gpu else f"{r['seconds'] * 1e3:.2f}",
            f"{r['images_per_second']:.1f}",
            *([f"{r['host_seconds'] * 1e3:.2f}"] if on_gpu else []),
            f"{r['mb']:.0f}",
            f"{r['start_mb']:.0f}",
        )
        mark = "← the better eager format" if r["best_eager"] else ""
        what = f"{r['workload']}, batch {r['batch']}"
        lines.append((what, TITLES[r["measure"]], NAMES[r["who"]], *figures, *ratios, mark))
    table(head, lines, 3)


# --- profile


def print_profile(profiles: dict[str, Record]) -> None:
    for name, p in profiles.items():
        print(f"{name}, batch {p['batch']}, {p['threads']} threads: step {p['step_ms']:.1f} ms\n")
        rows: list[tuple] = [(k["name"], k["calls"] or "", f"{k['ms']:.1f}", f"{k['share']:.1%}") for k in p["kernels"]]
        table("kernel|calls|ms|share", rows, 1)
        rows = [(r["name"], f"{r['forward_ms']:.1f}", f"{r['backward_ms']:.1f}") for r in p["layers"]]
        table("layer|forward ms|backward ms", rows, 1)
        print(
            f"matrix products: {p['products_share']:.0%} of the step, {p['multiply_adds'] / 1e9:.2f} G multiply-adds "
            f"(the definition, forward: {p['forward_multiply_adds'] / 1e9:.2f} G), {p['gflops']:.0f} GFLOP/s in the "
            f"step, {p['gflops_alone']:.0f} alone: {p['products_alone_ms']:.0f} ms of {p['step_ms']:.0f}\n"
        )
        rows = [
            (
                r["function"], f"{r['count']}×" if r["count"] > 1 else "", f"({r['m']}, {r['k']})·({r['k']}, {r['n']})",
                f"{r['calls']:.0f}", f"{r['ms']:.1f}", f"{r['gflops']:.0f}", f"{r['gflops_alone']:.0f}",
            )
            for r in p["products"][:12]
        ]  # fmt: skip
        table("product|count|sizes|calls|ms of one thread|GFLOP/s of one thread|alone", rows, 3)


# --- growth


def growth(whos: list[str], args: argparse.Namespace) -> list[Record]:
    """Seconds of a training step for each point of GROWTH, with one thread and with all of them."""
    rows = []
    for name, (model, classes, points, few) in GROWTH.items():
        works = [Workload(model, size, classes, batch) for size, batch in (points[:few] if args.quick else points)]
        counts = sorted({1, args.threads})
        for who in [who for who in whos if who in ("ours", "torch_channels_last")]:
            found = start(Job(who, works, counts, ["step"], 1 if args.quick else 2, not args.default_malloc))
            rows += [{"series": name, **record} for record in found]
    return rows


def print_growth(rows: list[Record]) -> None:
    for name in dict.fromkeys(r["series"] for r in rows):
        series = [r for r in rows if r["series"] == name]
        threads = sorted({r["threads"] for r in series})
        whos = list(dict.fromkeys(r["who"] for r in series))
        lines = []
        for size, batch in dict.fromkeys((r["size"], r["batch"]) for r in series):
            line: list = [f"{size}×{size}", batch]
            for who in whos:
                at = {r["threads"]: r for r in series if (r["size"], r["batch"], r["who"]) == (size, batch, who)}
                line += [f"{at[n]['seconds'] / batch * 1e3:.2f}" for n in threads]
                line += [f"{at[1]['seconds'] / at[threads[-1]]['seconds']:.2f}", f"{at[threads[-1]]['mb']:.0f}"]
            lines.append(tuple(line))
        print(f"{name}: milliseconds per picture of a training step")
        heads = ["|".join([*(f"{PEERS[who]}, {n} thr." for n in threads), "gain", "peak MB"]) for who in whos]
        table("|".join(["size", "batch", *heads]), lines, 1)


# --- memory


def memory(works: dict[str, Workload], whos: list[str]) -> list[Record]:
    """Bytes kept between forward and backward: by `summary`, by what NumPy has allocated, and by PyTorch's hooks."""
    rows = []
    for name, work in works.items():
        model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
        set_num_threads(1)
        counted = summary(model, (3, work.size, work.size)).saved_bytes * work.batch
        kept = {who: start(Job(who, [work], [1], ["kept"], 1))[0]["bytes"] for who in whos if who != "torch_compile"}
        rows.append({"workload": name, "batch": work.batch, "summary": counted, "kept": kept})
    return rows


def print_memory(rows: list[Record]) -> None:
    print("kept for backward, without the parameters")
    lines = []
    for r in rows:
        peers = [f"{PEERS[who]} {n / 2**20:.0f} MB" for who, n in r["kept"].items() if who != "ours"]
        ours, counted = r["kept"]["ours"], r["summary"]
        cells = (f"{counted / 2**20:.1f} MB", f"{ours / 2**20:.1f} MB", f"{counted / ours:.3f}", ", ".join(peers))
        lines.append((f"{r['workload']}, batch {r['batch']}", *cells))
    table("workload|summary says|measured|summary ÷ measured|peers", lines, 1)


# --- family


def family(args: argparse.Namespace) -> Iterator[Record]:
    """Every network at the size, with the classes and the heads it was published with; printed as it is measured."""
    print("| network | pictures | forward, ms | backward, ms | update, ms | images/s | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models or list_models():
        form = form_of(name)
        work = Workload(name, form.size.native, form.classes, args.batch or FAMILY_BATCH, form.aux_logits)
        (row,) = start(Job("ours", [work], [args.threads], ["parts_of_step"], 1 if args.quick else 3))
        row["images_per_second"] = work.batch / sum(row["seconds"].values())
        times = " | ".join(f"{seconds * 1e3:,.1f}" for seconds in row["seconds"].values())
        rate, mb = row["images_per_second"], row["mb"] - row["bare_mb"]
        print(f"| `{name}` | {work.batch}×{work.size}×{work.size} | {times} | {rate:.2f} | {mb:,.0f} |", flush=True)
        yield row


# --- on a GPU


def measure_gpu_parts(args: argparse.Namespace, parts: tuple[str, ...], results: Results) -> None:
    """Measure, print and keep each part. What fails is told, and is no reason to lose the others."""
    works = works_of(args, GPU_BATCH)
    print(results.conditions["machine"]["gpu"])
    torch = torch_here()
    precisions = [args.precision] if args.precision else list(PRECISIONS)
    recorded = importlib.util.find_spec("inception.training.graph") is not None
    whos = [
        who
        for who in GPU_PEERS
        for form in [Form.of(who)]
        if (form.precision in precisions or (form.precision == "bf16" and args.precision != "float32"))
        and (not form.graph or recorded or not form.ours)
        and (form.ours or torch.get("gpu"))
    ]
    if not torch.get("gpu"):
        print(f"nothing to compare with: {torch['why']}")
    for part in parts:
        started = time.perf_counter()
        print(f"\n{part}\n", flush=True)

        def keep(found: Any, part: str = part, started: float = started) -> None:
            results.keep(part, found, started)

        try:
            if part == "environment":
                keep(environment(args, torch))
            elif part == "tests":
                keep(run_tests(args))
            elif part == "ceilings":
                work = next(iter(works.values()))
                repeats = 1 if args.quick else 3
                job = Job("ours_float32", [work], [1], ["ceilings"], repeats, True, args.device)
                for row in attempt([job], started + GPU_SECONDS[part]):
                    keep(row)
                    print_ceilings(row)
            elif part == "compare":
                print_compare(compare_on_gpu(works, whos, args, keep))
            else:
                profile_on_gpu(works, whos, args, keep)
        except Exception as error:  # a part that is wrong must not lose those after it
            keep({"failed": first_line(error)})
            print(f"{part} failed: {first_line(error)}")


def attempt(jobs: list[Job], end: float) -> list[Record]:
    """The records of those jobs that are done well before this moment; a sentence for each that is not."""
    found: list[Record] = []
    for job, result in start_each(jobs, max(end - time.perf_counter(), 10)):
        if isinstance(result, Failed):
            print(f"{' and '.join(job.measures)}: {result}")
        else:
            found += result
    return found


def torch_here() -> Record:
    """Versions of PyTorch and its libraries, and whether it has a GPU; asked of another process, as it takes memory."""
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


def gpu_properties(device: int) -> Record:
    cupy: Any = default_module()
    properties: Record = cupy.cuda.runtime.getDeviceProperties(device)
    return properties


def environment(args: argparse.Namespace, torch: Record) -> Record:
    """What everything else was measured on, in the words of those who know."""
    cupy: Any = default_module()
    runtime, status, properties = cupy.cuda.runtime, cupy_status(device=args.device), gpu_properties(args.device)
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


def run_tests(args: argparse.Namespace) -> Record:
    """pytest -m gpu, all that it says in a file beside the results."""
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        print("no tests: they need pytest and the folder tests of the repository")
        return {"why": "no pytest, or no folder tests"}
    command = [sys.executable, "-m", "pytest", "-ra", "--durations=10", "-p", "no:cacheprovider", *TESTS]
    environment = os.environ | {"MINIGRAD_DEVICE": str(args.device)}
    path = (args.report or Path(tempfile.mkdtemp())) / "tests.txt"
    code: int | None = None
    with open(path, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=GPU_SECONDS["tests"]
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"the tests were not done within {GPU_SECONDS['tests']} seconds, and were stopped", file=file)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found: Record = {"exit_code": code, "summary": lines[-1] if lines else "", "output": path.name}
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed)", found["summary"])
    found["counts"] = {kind.removesuffix("s") if kind == "errors" else kind: int(count) for count, kind in counts}
    found["failures"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    print(found["summary"], *found["failures"], f"all they say: {path}", sep="\n")
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
        seconds = GPU_SECONDS["compare"] / len(works)
        for done in range(args.rounds or repeats):
            spent = time.perf_counter() - started
            if done and spent * (done + 1) / done > seconds:
                print(f"{name}: no more than {done} rounds, as another would take this beyond {seconds:.0f} seconds")
                break
            for ours in (True, False):
                names = [who for who in left if Form.of(who).ours is ours]
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
    """By our own means for ours; and if PyTorch is there, by its profiler for ours and the fastest of its own."""
    repeats = 1 if args.quick else 3
    precision = args.precision or "tf32"
    ours, theirs = f"ours_{precision}", f"torch_channels_last_{precision}"
    found: Record = {}
    end = time.perf_counter() + GPU_SECONDS["profile"]
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
                f"{name}, {NAMES[who]}, by PyTorch's profiler: {row['launches']:.0f} launches, {row['copies']:.0f} "
                f"copies, the GPU is busy for {row['busy_ms']:.2f} ms\n"
            )
            rows = [(r["name"][:90], f"{r['launches']:.0f}", f"{r['ms']:.3f}") for r in row["kernels"][:12]]
            table("kernel|launches|ms", rows, 1)


def print_gpu_profile(name: str, p: Record) -> None:
    bound = "the host holds the GPU up" if p["host_ms"] > p["device_ms"] else "the GPU is what takes time"
    print(
        f"{name}, batch {p['batch']}, {NAMES[p['who']]}: step {p['step_ms']:.2f} ms, the GPU needs "
        f"{p['device_ms']:.2f} and the host {p['host_ms']:.2f} to tell it: {bound}; "
        f"{p['launches_per_step']} launches without CuPy's own\n"
    )
    rows: list[tuple] = [(k["name"], k["calls"] or "", f"{k['ms']:.3f}", f"{k['share']:.1%}") for k in p["kernels"]]
    table("kernel|launches|ms|share", rows, 1)
    rows = []
    for r in p["launches"][:24]:
        rate = f"{r['gflops']:,.0f} GFLOP/s" if r["flop"] else f"{r['gb_per_second']:,.0f} GB/s" if r["mb"] else ""
        of = f"{r['gb_per_second'] / p['copy_gb_per_second']:.0%}" if r["mb"] and not r["flop"] else ""
        rows.append((r["kernel"], r["sizes"], r["calls"], f"{r['ms']:.4f}", f"{r['calls'] * r['ms']:.3f}", rate, of))
    table("launch|sizes|calls|ms each|ms|alone|of a copy's", rows, 2)
    rows = [(r["name"], f"{r['forward_ms']:.2f}", f"{r['backward_ms']:.2f}") for r in p["layers"]]
    table("layer, waited for after every op|forward ms|backward ms", rows, 1)
    print(
        f"matrix products: {p['products_share']:.0%} of the GPU's time, {p['multiply_adds'] / 1e9:.2f} G multiply-adds "
        f"(the definition, forward: {p['forward_multiply_adds'] / 1e9:.2f} G), alone {p['gflops_alone']:,.0f} GFLOP/s: "
        f"{p['products_alone_ms']:.2f} ms\n"
    )


if __name__ == "__main__":
    sys.exit(main())
