"""Rows to read, on the CPU and on a GPU: how those of `compare` come about from all rounds, and how all are printed."""

from __future__ import annotations

import statistics

from benchmarks.measure import MEASURES, NAMES, PEERS, TITLES, Form, Record, Workload

EAGER = ("torch", "torch_channels_last")
NUMBERS = ("seconds", "host_seconds", "mb", "start_mb")

Found = dict[tuple[str, str], list[Record]]  # (measure, network) -> a record of each round


def table(head: str, rows: list[tuple], left: int) -> None:
    """Print rows under the words of `head`, separated by |: `left` columns to the left, the others to the right."""
    lines = [tuple(head.split("|")), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print()


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


def print_kernels(head: str, profile: Record, digits: int) -> None:
    """Of a profile, by name: how often a kernel runs in a step, milliseconds, and its share of the step."""
    rows = [(k["name"], k["calls"] or "", f"{k['ms']:.{digits}f}", f"{k['share']:.1%}") for k in profile["kernels"]]
    table(head, rows, 1)


def print_layers(head: str, profile: Record, digits: int) -> None:
    """Of a profile, layer by layer: milliseconds."""
    rows = [(r["name"], *(f"{r[key]:.{digits}f}" for key in ("forward_ms", "backward_ms"))) for r in profile["layers"]]
    table(head, rows, 1)


def products_in(profile: Record, of: str) -> str:
    """How much of a step is matrix products, as words."""
    return (
        f"matrix products: {profile['products_share']:.0%} of {of}, {profile['multiply_adds'] / 1e9:.2f} G "
        f"multiply-adds (the definition, forward: {profile['forward_multiply_adds'] / 1e9:.2f} G)"
    )
