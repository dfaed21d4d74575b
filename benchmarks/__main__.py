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
        memory_check   the tests of all kernels under NVIDIA's compute-sanitizer: accesses outside of arrays, races,
                       reads of what was never written

On the CPU every network runs in a process of its own, ours and the peers' in turn, in `compare` call by call, with the
same number of threads; on a GPU ours share a process, and PyTorch's another. A ratio is our time over the peer's, the
median over the rounds: below 1 we are faster. Use a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks import plots
from benchmarks.gpu_parts import GPU_BATCH, GPU_PARTS, GPU_SECONDS, also_in, draw, gpu_properties, measure_gpu_parts
from benchmarks.measure import (
    GPU_PEERS,
    MEASURES,
    NAMES,
    PEERS,
    WORKLOADS,
    Failed,
    InTurn,
    Job,
    Record,
    Workload,
    cores,
    installed,
    interpreter,
    machine,
    start,
)
from benchmarks.tables import Found, medians, print_compare, print_kernels, print_layers, products_in, table
from inception.files import replace_file
from inception.models import create_model, form_of, list_models
from minigrad import set_backend, set_num_threads, summary
from minigrad.backend import BACKENDS, PRECISIONS
from minigrad.errors import MinigradError, no_such

PARTS = ("compare", "profile", "growth", "memory", "family")
# name -> (model, classes, [(size, batch), …], how many of them with --quick)
GROWTH = {
    "small, batch": ("googlenet_small", 10, [(32, 2**i) for i in range(9)], 4),
    "googlenet, batch": ("googlenet", 1000, [(224, 2**i) for i in range(6)], 2),
    "small, picture size": ("googlenet_small", 10, [(size, 32) for size in (32, 48, 64, 80, 96)], 2),
    "googlenet_bn, picture size": ("googlenet_bn", 1000, [(size, 4) for size in (64, 128, 192, 224, 256, 288)], 2),
}
ROUNDS = 15  # of compare
FAMILY_BATCH = 2  # with 1, batch norm has a single value a channel in inception_v3's head
MINUTES = {"compare": 4, "profile": 1, "growth": 6, "memory": 1, "family": 4}  # on two cores, with PyTorch


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART",
        help=f"{', '.join(PARTS)}; compare if left out, with --report all; on a GPU those above",
    )  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, default="numpy", help="cupy: on an NVIDIA GPU")
    parser.add_argument("--device", type=number, metavar="N", help="which GPU, from 0: 0 if left out")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the GPU's products: both if left out")
    parser.add_argument("--no-tests", action="store_true", help="of --backend cupy: without tests and memory_check")
    parser.add_argument("--workload", choices=[*WORKLOADS], action="append",
        help="what to measure, may be repeated (default: small and googlenet)")  # fmt: skip
    parser.add_argument(
        "--models", nargs="+", choices=list_models(), metavar="MODEL", help="of family: all if left out"
    )
    parser.add_argument(
        "--who", nargs="+", choices=list(NAMES), metavar="NAME", help="of compare: these alone of "
        f"{', '.join(PEERS)}; on a GPU, for example, ours_tf32_graph or torch_channels_last_tf32"
    )  # fmt: skip
    parser.add_argument("--batch", type=positive, help=f"instead of the workload's own, or {FAMILY_BATCH} of family")
    parser.add_argument("--threads", type=positive, default=cores(), help="all cores if left out")
    parser.add_argument("--rounds", type=positive, help=f"of compare: {ROUNDS}, on a GPU 3, or 1 with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="tiny batches, one round: does it run? Figures mean little"
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile too, which takes minutes to compile")
    parser.add_argument(
        "--default-malloc", action="store_true", help="PyTorch with the C library's own setting, not minigrad's: slower"
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH",
        help="run minigrad with this interpreter, such as a free-threaded one, and PyTorch with the one that runs this",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="DIR", help="write results.json and pictures there")
    args = parser.parse_args()
    on_gpu = args.backend == "cupy"
    known = GPU_PARTS if on_gpu else PARTS
    if unknown := sorted({*args.parts} - {*known}):
        parser.error(no_such("part on a GPU" if on_gpu else "part", unknown[0], known))
    comparable = [*GPU_PEERS] if on_gpu else [who for who in PEERS if who != "torch_compile" or args.compile]
    if unknown := [who for who in args.who or () if who not in comparable]:
        if unknown[0] == "torch_compile" and not on_gpu:
            parser.error("--who torch_compile needs --compile, since compiling takes minutes")
        parser.error(no_such("network to compare", unknown[0], comparable))
    if on_gpu and (args.python != sys.executable or args.compile or args.default_malloc or args.models):
        parser.error("--python, --compile, --default-malloc and --models are for --backend numpy")
    if not on_gpu and (args.device is not None or args.precision or args.no_tests):
        parser.error("--device, --precision and --no-tests are for --backend cupy")
    parts = args.parts or (known if args.report else ("compare",))
    if args.no_tests:
        parts = tuple(part for part in parts if part not in ("tests", "memory_check"))
    try:
        if on_gpu:
            args.device = args.device or 0
            set_backend("cupy", args.device)  # or say why not
        if args.report:  # before minutes of measuring, not after
            if not on_gpu:
                plots.check()
            args.report.mkdir(parents=True, exist_ok=True)
        results = Results(args)
        if on_gpu:
            with also_in(args.report and args.report / "report.txt"):
                print(f"{', '.join(parts)}: {sum(GPU_SECONDS[part] for part in parts) / 60:.0f} min at most")
                print(results.conditions["machine"]["gpu"])
                measure_gpu_parts(args, parts, works_of(args, GPU_BATCH), results.keep)
                if results.path:
                    print("written:", results.path, *draw(results.parts, args.report))
        else:
            minutes = 1 if args.quick else sum(MINUTES[part] for part in parts)
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
        if args.python != sys.executable:
            self.conditions["machine"]["versions_of_minigrad"] = interpreter(args.python)
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
    if installed() == ["ours"]:
        print("PyTorch is not installed: nothing to compare with")
    print(" · ".join(f"{key} {value}" for key, value in results.conditions["machine"].items()), end="\n\n")
    found: Any
    for part in parts:
        started = time.perf_counter()
        if part == "compare":
            found = compare(works, [who for who in whos if who in (args.who or whos)], args)
            print_compare(found)
        elif part == "profile":
            steps = 1 if args.quick else 3
            found = {
                name: start_job(args, "ours", [work], [args.threads], ["profile"], steps)[0]
                for name, work in works.items()
            }
            print_profile(found)
        elif part == "growth":
            found = growth(whos, args)
            print_growth(found)
        elif part == "memory":
            found = memory(works, whos, args)
            print_memory(found)
        else:
            found = []
            for row in family(args):
                found.append(row)
                results.keep(part, found, started)
            print()
        results.keep(part, found, started)


def start_job(
    args: argparse.Namespace, who: str, works: list[Workload], threads: list[int], measures: list[str], repeats: int
) -> list[Record]:
    """What a process of its own measures on the CPU, as the arguments say."""
    return start(Job(who, works, threads, measures, repeats, not args.default_malloc, python=args.python))


def works_of(args: argparse.Namespace, least: int = 1) -> dict[str, Workload]:
    """The workloads that are wanted, at batches of at least so many pictures unless told otherwise."""
    works = {}
    for name in args.workload or ("small", "googlenet"):
        work = WORKLOADS[name]
        batch = max(work.batch // 8, 2) if args.quick else max(work.batch, least)
        works[name] = work._replace(batch=args.batch or batch)
    return works


# --- compare


def compare(works: dict[str, Workload], whos: list[str], args: argparse.Namespace) -> list[Record]:
    """One record for every workload, measure and network: medians over the rounds, and of our ratio to it. A round is
    one call of each; two that are not counted come before."""
    rows: list[Record] = []
    for name, work in works.items():
        found: Found = {}
        networks = {who: in_turn(args, who, work) for who in whos}
        try:
            for measure in MEASURES:
                for number in range(-1 if args.quick else -2, args.rounds or (1 if args.quick else ROUNDS)):
                    for who, network in list(networks.items()):
                        try:
                            record = network.ask(measure)
                        except Failed as error:
                            if who != "torch_compile":
                                raise
                            print(f"torch.compile does not work here: {error}")
                            whos.remove(who)
                            networks.pop(who).end()
                            continue
                        if number >= 0:
                            found.setdefault((measure, who), []).append(record)
        finally:
            for network in networks.values():
                network.end()
        rows += [row | {"threads": args.threads} for row in medians(name, work, found)]
    return rows


def in_turn(args: argparse.Namespace, who: str, work: Workload) -> InTurn:
    return InTurn(Job(who, [work], [args.threads], [], 1, not args.default_malloc, python=args.python))


# --- profile


def print_profile(profiles: dict[str, Record]) -> None:
    for name, p in profiles.items():
        print(f"{name}, batch {p['batch']}, {p['threads']} threads: step {p['step_ms']:.1f} ms\n")
        print_kernels("kernel|calls|ms|share", p, 1)
        print_layers("layer|forward ms|backward ms", p, 1)
        print(
            f"{products_in(p, 'the step')}, {p['gflops']:.0f} GFLOP/s in the step, {p['gflops_alone']:.0f} alone: "
            f"{p['products_alone_ms']:.0f} ms of {p['step_ms']:.0f}\n"
        )
        rows: list[tuple] = [
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
            found = start_job(args, who, works, counts, ["step"], 1 if args.quick else 2)
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


def memory(works: dict[str, Workload], whos: list[str], args: argparse.Namespace) -> list[Record]:
    """Bytes kept between forward and backward: by `summary`, by what NumPy has allocated, and by PyTorch's hooks."""
    rows = []
    for name, work in works.items():
        model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
        set_num_threads(1)
        counted = summary(model, (3, work.size, work.size)).saved_bytes * work.batch
        kept = {
            who: start_job(args, who, [work], [1], ["kept"], 1)[0]["bytes"] for who in whos if who != "torch_compile"
        }
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
        (row,) = start_job(args, "ours", [work], [args.threads], ["parts_of_step"], 1 if args.quick else 3)
        row["images_per_second"] = work.batch / sum(row["seconds"].values())
        times = " | ".join(f"{seconds * 1e3:,.1f}" for seconds in row["seconds"].values())
        rate, mb = row["images_per_second"], row["mb"] - row["bare_mb"]
        print(f"| `{name}` | {work.batch}×{work.size}×{work.size} | {times} | {rate:.2f} | {mb:,.0f} |", flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
