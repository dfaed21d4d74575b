"""The parts on the CPU beside `compare`: where a step's time goes, how it grows, what is kept, the whole family."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.processes import start
from benchmarks.tables import count, print_kernels, print_layers, products_in, table
from benchmarks.vocabulary import CONTENDERS, Job, Record, Workload
from inception.models import create_model, form_of, list_models
from minigrad import set_num_threads, summary

# name -> (model, classes, [(size, batch), …], how many of them with --quick)
GROWTH = {
    "small, batch": ("googlenet_small", 10, [(32, 2**i) for i in range(9)], 4),
    "googlenet, batch": ("googlenet", 1000, [(224, 2**i) for i in range(6)], 2),
    "small, picture size": ("googlenet_small", 10, [(size, 32) for size in (32, 48, 64, 80, 96)], 2),
    "googlenet_bn, picture size": ("googlenet_bn", 1000, [(size, 4) for size in (64, 128, 192, 224, 256, 288)], 2),
}
FAMILY_BATCH = 2  # with 1, batch norm has a single value per channel in inception_v3's head


def start_job(
    args: argparse.Namespace, who: str, works: list[Workload], threads: list[int], measures: list[str], repeats: int
) -> list[Record]:
    """The records of a job in a fresh process."""
    return start(Job(who, works, threads, measures, repeats, not args.default_malloc, python=args.python))


# --- profile


def profile(works: dict[str, Workload], args: argparse.Namespace) -> dict[str, Record]:
    who, steps = f"ours_{args.kernels}" if args.kernels else "ours", 1 if args.quick else 3
    threads = [max(args.threads)]
    return {name: start_job(args, who, [work], threads, ["profile"], steps)[0] for name, work in works.items()}


def print_profile(profiles: dict[str, Record]) -> None:
    for name, p in profiles.items():
        threads = count(p["threads"])
        print(f"{name}, batch {p['batch']}, {threads}, {p['module']}: step {p['step_ms']:.1f} ms\n")
        print_kernels("kernel|calls|ms|share|rate", p, 1)
        print_layers("layer|forward ms|backward ms", p, 1)
        print(f"{products_in(p)} of {p['step_ms']:.0f}\n")
        rows: list[tuple] = [
            (
                r["function"], f"{r['count']}×" if r["count"] > 1 else "", f"({r['m']}, {r['k']})·({r['k']}, {r['n']})",
                f"{r['calls']:.0f}", f"{r['ms']:.1f}", f"{r['gflops']:.0f}", f"{r['gflops_alone']:.0f}",
            )
            for r in p["products"][:12]
        ]  # fmt: skip
        table("kernel|products|sizes|calls|ms|GFLOP/s|of the products alone", rows, 3)


# --- growth


def growth(whos: list[str], args: argparse.Namespace) -> list[Record]:
    """The seconds of a training step at each point of GROWTH, with one thread and with all of them."""
    rows = []
    for name, (model, classes, points, few) in GROWTH.items():
        works = [Workload(model, size, classes, batch) for size, batch in (points[:few] if args.quick else points)]
        counts = sorted({1, max(args.threads)})
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
        heads = [
            "|".join([*(f"{CONTENDERS[who].title}, {n} thr." for n in threads), "gain", "peak MB"]) for who in whos
        ]
        table("|".join(["size", "batch", *heads]), lines, 1)


# --- memory


def memory(works: dict[str, Workload], whos: list[str], args: argparse.Namespace) -> list[Record]:
    """The bytes kept between forward and backward: as `summary` counts them, as NumPy allocates, by PyTorch's hooks."""
    rows = []
    for name, work in works.items():
        model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
        set_num_threads(1)
        counted = summary(model, (3, work.size, work.size)).saved_bytes * work.batch
        able = [who for who in whos if who in ("ours", "torch", "torch_channels_last")]
        kept = {who: start_job(args, who, [work], [1], ["kept"], 1)[0]["bytes"] for who in able}
        rows.append({"workload": name, "batch": work.batch, "summary": counted, "kept": kept})
    return rows


def print_memory(rows: list[Record]) -> None:
    print("kept for backward, without the parameters")
    lines = []
    for r in rows:
        peers = [f"{CONTENDERS[who].title} {n / 2**20:.0f} MB" for who, n in r["kept"].items() if who != "ours"]
        ours, counted = r["kept"]["ours"], r["summary"]
        cells = (f"{counted / 2**20:.1f} MB", f"{ours / 2**20:.1f} MB", f"{counted / ours:.3f}", ", ".join(peers))
        lines.append((f"{r['workload']}, batch {r['batch']}", *cells))
    table("workload|summary says|measured|summary ÷ measured|peers", lines, 1)


# --- family


def family(args: argparse.Namespace) -> Iterator[Record]:
    """Every network at the size, with the classes and the heads of its publication; printed as it is measured."""
    print("| network | pictures | forward, ms | backward, ms | update, ms | images/s | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models or list_models():
        form = form_of(name)
        batch = max(args.batch or [FAMILY_BATCH])
        work = Workload(name, form.size.native, form.classes, batch, form.aux_logits)
        (row,) = start_job(args, "ours", [work], [max(args.threads)], ["parts_of_step"], 1 if args.quick else 3)
        row["images_per_second"] = work.batch / sum(row["seconds"].values())
        times = " | ".join(f"{seconds * 1e3:,.1f}" for seconds in row["seconds"].values())
        rate, mb = row["images_per_second"], row["mb"] - row["bare_mb"]
        print(f"| `{name}` | {work.batch}×{work.size}×{work.size} | {times} | {rate:.2f} | {mb:,.0f} |", flush=True)
        yield row
    print()
