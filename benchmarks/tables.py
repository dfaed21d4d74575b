"""Rows to read, of the CPU and of a GPU: how those of `compare` follow from all rounds, and how tables are printed."""

from __future__ import annotations

import math
import statistics

from benchmarks.vocabulary import CONTENDERS, HOST, MEASURES, TITLES, Record, Workload

NUMBERS = ("seconds", "host_seconds", "mb", "start_mb")

Found = dict[tuple[str, str], list[Record]]  # (measure, contender) -> a record of each round


def table(head: str, rows: list[tuple], left: int) -> None:
    """Print rows below the words of `head`, which | separates: `left` columns aligned left, the others right."""
    lines = [tuple(head.split("|")), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print()


def medians(workload: str, work: Workload, found: Found) -> list[Record]:
    """The rows of a workload, one for each measure and contender.

    ratio_seconds, ratio_mb   minigrad's over the contender's, the median over the rounds: below 1 minigrad needs less.
                              On a GPU minigrad has the contender's precision, and is a CUDA graph beside a CUDA graph
    best_eager                the fastest of PyTorch's formats that runs op by op, in its precision
    best_compiled             the fastest engine that compiles the network first
    """
    rows: list[Record] = []
    for (measure, who), records in found.items():
        row: Record = {"workload": workload, "batch": work.batch, "measure": measure, "who": who}
        row |= {key: statistics.median(r[key] for r in records) for key in NUMBERS if key in records[0]}
        row |= {"images_per_second": work.batch / row["seconds"], "rounds": [r["seconds"] for r in records]}
        contender = CONTENDERS[who]
        counterparts = ["ours"] if who in HOST else [f"ours_{contender.precision}_graph"] * contender.graph
        counterparts += [f"ours_{contender.precision}"]
        mine = next((name for name in counterparts if (measure, name) in found), None)
        for key in ("seconds", "mb") if mine else ():
            pairs = zip(found[measure, mine or ""], records, strict=False)
            row[f"ratio_{key}"] = statistics.median(ours[key] / other[key] for ours, other in pairs)
        rows.append(row)
    for row in rows:
        for kind in ("eager", "compiled"):
            rivals = [r for r in rows if getattr(CONTENDERS[r["who"]], kind) and alike(r, row)]
            row[f"best_{kind}"] = bool(rivals) and row is min(rivals, key=lambda r: r["seconds"])
    order = [*reversed(MEASURES)]
    return sorted(rows, key=lambda r: (order.index(r["measure"]), list(CONTENDERS).index(r["who"])))


def alike(a: Record, b: Record) -> bool:
    return a["measure"] == b["measure"] and CONTENDERS[a["who"]].precision == CONTENDERS[b["who"]].precision


def print_compare(rows: list[Record]) -> None:
    """Every contender on a line of its own."""
    on_gpu = any("host_seconds" in row for row in rows)
    head = "workload|measure|network|ms|images/s|peak MB|before the first call|time ratio|memory ratio|"
    if on_gpu:
        head = head.replace("|peak MB", "|host ms|peak MB")
    digits, lines = 2 if on_gpu else 1, []
    for r in rows:
        compared = "ratio_seconds" in r and r["who"] != "ours" and not (on_gpu and CONTENDERS[r["who"]].ours)
        ratios = (f"{r['ratio_seconds']:.2f}", f"{r['ratio_mb']:.2f}") if compared else ("", "")
        figures = (
            f"{r['seconds'] * 1e3:.{digits}f}",
            f"{r['images_per_second']:.1f}",
            *([f"{r['host_seconds'] * 1e3:.2f}"] if on_gpu else []),
            f"{r['mb']:.0f}",
            f"{r['start_mb']:.0f}",
        )
        mark = "← best eager" if r["best_eager"] else "← best compiled" if r.get("best_compiled") else ""
        where = f"{r['workload']}, batch {r['batch']}" + (f", {count(r['threads'])}" if "threads" in r else "")
        lines.append((where, TITLES[r["measure"]], CONTENDERS[r["who"]].title, *figures, *ratios, mark))
    table(head, lines, 3)


def count(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def by_case(rows: list[Record]) -> dict[tuple, dict[str, Record]]:
    """(workload, batch, threads, measure) -> contender -> row."""
    cases: dict[tuple, dict[str, Record]] = {}
    for r in rows:
        cases.setdefault((r["workload"], r["batch"], r["threads"], r["measure"]), {})[r["who"]] = r
    return cases


def print_ratios(rows: list[Record]) -> None:
    """A line for each measure: minigrad over the better eager format, the best compiled engine, and others of ours."""
    cases = by_case(rows)
    others = [who for who in HOST if HOST[who].ours and who != "ours" and any(r["who"] == who for r in rows)]
    lines: list[tuple] = []
    for (name, batch, n, measure), case in cases.items():
        if "ours" not in case:
            continue
        fewest = cases.get((name, batch, min(t for w, b, t, _ in cases if (w, b) == (name, batch)), measure), case)
        gain = fewest["ours"]["seconds"] / case["ours"]["seconds"] if fewest is not case else math.nan
        line = [name, TITLES[measure], batch, n, f"{case['ours']['seconds'] * 1e3:.1f}"]
        line.append("" if math.isnan(gain) else f"{gain:.2f}")
        for kind in ("eager", "compiled"):
            best = next((r for r in case.values() if r.get(f"best_{kind}")), None)
            line += [CONTENDERS[best["who"]].title if best else "", f"{best['ratio_seconds']:.2f}" if best else ""]
            line += [f"{best['ratio_mb']:.2f}" if best else ""] * (kind == "eager")
        for who in others:
            line += [f"{case[who]['ratio_seconds']:.3f}", f"{case[who]['ratio_mb']:.3f}"] if who in case else ["", ""]
        lines.append(tuple(line))
    print("minigrad's time and memory over the others': medians over the turns, below 1 minigrad needs less\n")
    heads = [f"to {CONTENDERS[who].title.removeprefix('minigrad, ')}|its memory" for who in others]
    compared = ["better eager format", "time", "memory", "best compiled", "time", *heads]
    table("|".join(["workload", "measure", "batch", "threads", "ms", "gain by threads", *compared]), lines, 2)
    for who in others:
        for (name, batch, n, _), case in cases.items():
            if "first_step" in case.get(who, {}):
                print(f"{name}, batch {batch}, {count(n)}, first step: {bits(case.pop(who)['first_step'], who)}")
                break


def bits(first: Record, who: str) -> str:
    """How close the results of a first step are to those of another minigrad, in words."""
    words = [
        f"{kind} bit-identical" if far == 0 else f"{kind} equal to {-math.log2(far):.1f} bits ({far:.1e})"
        for kind, far in first.items()
    ]
    return f"{', '.join(words)} with {CONTENDERS[who].title}"


def print_kernels(head: str, profile: Record, digits: int) -> None:
    """The kernels of a profile: how often each runs in a step, its milliseconds, its share of the step and its rate."""
    rows = []
    for k in profile["kernels"]:
        rate = f"{k['ns']:.2f} ns/value" if "ns" in k else f"{k['gflops']:,.0f} GFLOP/s" if "gflops" in k else ""
        rows.append((k["name"], k["calls"] or "", f"{k['ms']:.{digits}f}", f"{k['share']:.1%}", rate))
    table(head, rows, 1)


def print_layers(head: str, profile: Record, digits: int) -> None:
    """The layers of a profile, in milliseconds."""
    rows = [(r["name"], *(f"{r[key]:.{digits}f}" for key in ("forward_ms", "backward_ms"))) for r in profile["layers"]]
    table(head, rows, 1)


def products_in(profile: Record) -> str:
    """The matrix products of a step, in words."""
    return (
        f"matrix products: {profile['multiply_adds'] / 1e9:.2f} G multiply-adds (by the definition, forward: "
        f"{profile['forward_multiply_adds'] / 1e9:.2f} G); alone they run at {profile['gflops_alone']:,.0f} GFLOP/s "
        f"and take {profile['products_alone_ms']:.2f} ms"
    )
