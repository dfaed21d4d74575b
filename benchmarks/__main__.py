"""Measure speed and memory, beside PyTorch, onnxruntime and OpenVINO where they are installed.

    python -m benchmarks                        compare: step, forward, evaluation, peak memory
    python -m benchmarks compare --full         the same at small and large batches, on one thread and on all
    python -m benchmarks --against DIR          beside the minigrad of another checkout, by turns
    python -m benchmarks --kernels textbook     beside minigrad's textbook kernels: time, memory, bits of the first step
    python -m benchmarks profile                where a step's time goes: kernels, layers, matrix products
    python -m benchmarks growth                 time per picture against batch, picture size and threads
    python -m benchmarks memory                 bytes kept for backward: by `summary`, and as measured
    python -m benchmarks family                 a training step of every network at its native size, as a Markdown table
    python -m benchmarks --report DIR           the five parts, with pictures, in DIR/PROCESSOR; parts measured earlier
                                                and not now stay there
    python -m benchmarks machines               the comparisons of all processors in --report, side by side

    python -m benchmarks --backend cupy --report DIR        the same program on an NVIDIA GPU, in about five minutes:
        environment    the GPU, its driver, CUDA, CuPy, PyTorch
        ceilings       how fast this GPU copies and multiplies, what a launch costs the host
        compare        beside PyTorch: both memory formats, float32, TF32, bf16, eager and as CUDA graphs
        profile        where a step's time goes: kernels, launches, layers, and how long the GPU waits for the host
    (`python tests/check_gpu.py` checks whether a GPU's results are right.)

On the CPU every network runs in a process of its own, with the same number of threads; in `compare` the processes take
turns, call by call. On a GPU minigrad's networks share a process, and PyTorch's another. A ratio is minigrad's time
over the other's, the median over the rounds: below 1 minigrad is faster. Use a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_parts, parts, plots
from benchmarks.compare import ROUNDS, compare, installed
from benchmarks.machine import cores, interpreter, machine
from benchmarks.results import HERE, Results, side_by_side
from benchmarks.tables import print_compare, print_ratios
from benchmarks.vocabulary import CONTENDERS, FULL, GPU, HOST, MEASURES, PEERS, WORKLOADS, Failed, Record, Workload
from inception.models import list_models
from minigrad import set_backend
from minigrad.backend import BACKENDS, PRECISIONS
from minigrad.errors import MinigradError, no_such

PARTS = ("compare", "profile", "growth", "memory", "family")
MINUTES = {"compare": 8, "profile": 1, "growth": 6, "memory": 1, "family": 4}  # on two cores, with all peers
ON_HOST = ("python", "default_malloc", "models", "against", "kernels", "full", "measures")
ON_GPU = ("device", "precision")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, machines; default: compare; with --report all")
    add("--backend", choices=BACKENDS, default="numpy", help="cupy: on an NVIDIA GPU")
    add("--device", type=number, metavar="N", help="the GPU's number, from 0; default: 0")
    add("--precision", choices=PRECISIONS, help="of a GPU's products; default: both")
    add("--workload", choices=[*WORKLOADS], action="append", help="may be repeated; default: small and googlenet")
    add("--models", nargs="+", choices=list_models(), metavar="MODEL", help="of family; default: all")
    add("--who", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="only these networks in compare, of "
        f"ours, {', '.join(PEERS)}; on a GPU, for example, ours_tf32_graph or torch_channels_last_tf32")  # fmt: skip
    add("--measures", nargs="+", choices=MEASURES, metavar="NAME", help=f"of compare: {', '.join(MEASURES)}; all")
    add("--batch", type=positive, nargs="+", metavar="N", help="in place of the workload's own: several in compare, "
        "the largest in other parts")  # fmt: skip
    add("--threads", type=positive, nargs="+", metavar="N", help="several in compare, the largest in other parts; "
        "default: all cores")  # fmt: skip
    add("--full", action="store_true", help="compare all workloads, each at its batches, on one thread and on all")
    add("--against", type=Path, metavar="DIR", help="compare with the minigrad of this checkout too")
    add("--kernels", choices=[c.kernels for c in HOST.values() if c.kernels], help="compare with minigrad's kernels of "
        "this name too, or profile them")  # fmt: skip
    add("--rounds", type=positive, help=f"of compare; default: {ROUNDS}, on a GPU 3, with --quick 1")
    add("--quick", action="store_true", help="tiny batches, one round: a test of the program; figures mean little")
    add("--default-malloc", action="store_true", help="peers with the C library's own setting, not minigrad's: slower")
    add("--python", default=sys.executable, metavar="PATH", help="run minigrad with this interpreter, such as a "
        "free-threaded one, and peers with the one that runs this")  # fmt: skip
    add("--report", type=Path, metavar="DIR", help="write DIR/PROCESSOR/results.json and pictures beside it")
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    on_gpu = args.backend == "cupy"
    check(parser, args, gpu_parts.PARTS if on_gpu else PARTS)
    wanted = args.parts or ((gpu_parts.PARTS if on_gpu else PARTS) if args.report else ("compare",))
    args.threads = args.threads or sorted({1, cores()} if args.full else {cores()})
    results = None
    try:
        if wanted == ["machines"]:
            print(side_by_side(args.report or HERE))
            return 0
        if on_gpu:
            args.device = args.device or 0
            set_backend("cupy", args.device)  # fails here, with the reason, where there is no GPU
        elif args.report:
            plots.check()  # before minutes of measuring
        results = Results(args.report, conditions(args))
        print(" · ".join(f"{key} {value}" for key, value in results.conditions["machine"].items()))
        if on_gpu:
            print(f"{', '.join(wanted)}: {sum(gpu_parts.SECONDS[part] for part in wanted) / 60:.0f} min at most")
            gpu_parts.measure(args, wanted, works_of(args, gpu_parts.BATCH), results.keep)
        else:
            minutes = 1 if args.quick else sum(MINUTES[part] for part in wanted) * (4 if args.full else 1)
            print(f"{', '.join(wanted)}: about {minutes} min", end="\n\n")
            measure_parts(args, wanted, results)
        if results.path:
            print("written:", results.path, *draw(results, on_gpu))
    except KeyboardInterrupt:
        print(
            "stopped" + (f"; {results.path} has what was measured" if results and results.path else ""), file=sys.stderr
        )
        return 130
    except (Failed, plots.NoPlots, MinigradError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    return 0


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, known: tuple[str, ...]) -> None:
    """End with one sentence where options contradict each other."""
    on_gpu = args.backend == "cupy"
    if args.parts != ["machines"] and (unknown := sorted({*args.parts} - {*known})):
        parser.error(no_such("part on a GPU" if on_gpu else "part", unknown[0], known))
    comparable = [*GPU] if on_gpu else ["ours", *PEERS]
    if unknown := [who for who in args.who or () if who not in comparable]:
        parser.error(no_such("network to compare", unknown[0], comparable))
    foreign = ON_HOST if on_gpu else ON_GPU
    if given := [name for name in foreign if getattr(args, name) != parser.get_default(name)]:
        other = "numpy" if on_gpu else "cupy"
        parser.error(f"--{given[0].replace('_', '-')} is for --backend {other}")
    if args.full and (args.workload or args.batch or args.threads):
        parser.error("--full chooses workloads, batches and threads: leave out --workload, --batch and --threads")
    if args.against and not (args.against / "minigrad/__init__.py").is_file():
        parser.error(f"--against: {args.against} is no checkout: it has no folder minigrad")


def number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a GPU: 0, 1, …")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def conditions(args: argparse.Namespace) -> Record:
    """What holds for all figures of this run."""
    gpu = gpu_parts.name_of(args.device) if args.backend == "cupy" else ""
    found: Record = {"machine": machine(gpu), "quick": args.quick, "threads": max(args.threads)}
    if args.python != sys.executable:
        found["machine"]["versions_of_minigrad"] = interpreter(args.python)
    return found | {"default_malloc": args.default_malloc}


def draw(results: Results, on_gpu: bool) -> list[Path]:
    """The pictures; on the machine of a GPU none where matplotlib is absent."""
    assert results.folder
    try:
        return plots.draw(results.parts, results.folder)
    except plots.NoPlots as error:
        if not on_gpu:
            raise
        print(f"no pictures: {error}")
        return []


def works_of(args: argparse.Namespace, least: int = 1) -> dict[str, Workload]:
    """The workloads, with batches of at least `least` pictures unless --batch says otherwise."""
    works = {}
    for name in args.workload or (FULL if args.full else ("small", "googlenet")):
        work = WORKLOADS[name]
        batch = max(work.batch // 8, 2) if args.quick else max(work.batch, least)
        works[name] = work._replace(batch=max(args.batch or [batch]))
    return works


def measure_parts(args: argparse.Namespace, wanted: tuple[str, ...], results: Results) -> None:
    """Measure, print and keep each part."""
    works, whos = works_of(args), installed()
    found: Any
    for part in wanted:
        started = time.perf_counter()
        if part == "compare":
            found = []
            chosen = [who for who in whos if who in (args.who or whos)]
            chosen += ["ours_before"] * bool(args.against) + [f"ours_{args.kernels}"] * bool(args.kernels)
            batches = {name: FULL[name] if args.full else args.batch or [work.batch] for name, work in works.items()}
            cases = [(name, work._replace(batch=n)) for name, work in works.items() for n in batches[name]]
            for rows in compare(cases, chosen, args):
                print_compare(rows)
                found += rows
                results.keep(part, found, started)
            print_ratios(found)
        elif part == "profile":
            found = parts.profile(works, args)
            parts.print_profile(found)
        elif part == "growth":
            found = parts.growth(whos, args)
            parts.print_growth(found)
        elif part == "memory":
            found = parts.memory(works, whos, args)
            parts.print_memory(found)
        else:
            found = []
            for row in parts.family(args):
                found.append(row)
                results.keep(part, found, started)
        results.keep(part, found, started)


if __name__ == "__main__":
    sys.exit(main())
