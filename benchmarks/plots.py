"""The results as pictures. Nothing else here imports matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.vocabulary import CONTENDERS, GPU, HOST, TITLES, Record

# Okabe and Ito's colours, which differ for colour-blind readers too.
COLOURS = {
    "ours": "#0072B2", "torch": "#E69F00", "torch_channels_last": "#D55E00", "torch_compile": "#CC79A7",
    "onnxruntime": "#009E73", "openvino": "#56B4E9", "ours_before": "#666666", "ours_textbook": "#999999",
    "ours_loops": "#BBBBBB",
}  # fmt: skip
INK, GREY, LIGHT = "#222222", "#666666", "#DDDDDD"


class NoPlots(Exception):
    """matplotlib is absent."""


def check() -> None:
    """Raise NoPlots where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NoPlots("--report draws with matplotlib: pip install matplotlib")


def draw(results: Record, folder: Path) -> list[Path]:
    """Write one picture, 900 pixels wide, for each part of results.json that has one."""
    check()
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 10.5,
        "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "grid.color": LIGHT, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 4,
    }  # fmt: skip
    written = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        for part, plot in PLOTS.items():
            if part not in results or "failed" in results[part]["found"]:
                continue
            found, where = results[part]["found"], results[part]["machine"]
            if plot is comparison and not any(compared(row) for row in found):
                continue
            figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
            plot(figure, found)
            versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
            figure.supxlabel(
                f"{where.get('gpu') or where['cpu']}, {where['cores']} cores, {versions}, {where['date']}"
                + (" – a quick run: figures mean little" if results[part]["quick"] else ""),
                fontsize=8, color=GREY,
            )  # fmt: skip
            written.append(folder / f"{part}.png")
            figure.savefig(written[-1])
    return written


def compared(row: Record) -> bool:
    """Whether the row has a ratio to draw. On a GPU, with its many networks, only training steps are drawn."""
    shown = row["who"] in HOST or row["measure"] == "step"
    ours = CONTENDERS[row["who"]].ours if row["who"] in GPU else row["who"] == "ours"
    return shown and "ratio_seconds" in row and not ours


def comparison(figure: Any, rows: list[Record]) -> None:
    """Bars of minigrad's time and memory over each other contender's."""
    rows = [row for row in rows if compared(row)]
    whos = [who for who in CONTENDERS if any(row["who"] == who for row in rows)]
    groups = list(dict.fromkeys(case_of(row) for row in rows))
    figure.set_size_inches(9, 1.5 + 0.2 * len(whos) / 3 + 0.26 * len(groups) * (len(whos) + 1))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("ratio_seconds", "ratio_mb"), ("time", "peak memory"), strict=True):
        labelled: set[str] = set()
        for row in rows:
            group, i = groups.index(case_of(row)), whos.index(row["who"])
            y = group * (len(whos) + 1) + i
            contender = CONTENDERS[row["who"]]
            style: dict[str, Any] = {"color": colour(row["who"]), "hatch": "//" if contender.graph else ""}
            style |= {"edgecolor": "white", "alpha": 0.6 if contender.precision == "tf32" else 1}
            first = row["who"] not in labelled
            labelled.add(row["who"])
            axes.barh(y, row[key], 0.85, **style, label=contender.title if first else None)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line at 1
            at = {"xy": (row[key], y), "xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{row[key]:.2f}", **at, bbox=box)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_title(f"minigrad's {title} ÷ theirs (left of the line: less)")
        axes.set_xlim(0, max(1.25, *(row[key] * 1.18 for row in rows)))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    middles = [group * (len(whos) + 1) + (len(whos) - 1) / 2 for group in range(len(groups))]
    panels[0].set_yticks(
        middles,
        [f"{workload}, batch {batch}{threads}\n{TITLES[measure]}" for workload, batch, threads, measure in groups],
    )
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(whos), 3))


def case_of(row: Record) -> tuple:
    """Workload, batch, threads and measure of a row of `compare`, as far as it has them."""
    return row["workload"], row["batch"], f", {row['threads']} thr." if "threads" in row else "", row["measure"]


def colour(who: str) -> str:
    return next(COLOURS[name] for name in sorted(COLOURS, key=len, reverse=True) if who.startswith(name))


def growth(figure: Any, rows: list[Record]) -> None:
    """Time per picture against batch and pixels; below, the gain by more threads."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    most = max(row["threads"] for row in rows)
    figure.set_size_inches(9, 2.9 * len(names) / 2 * (1.45 if most > 1 else 1) + 0.6)
    panels = figure.subplots(3 if most > 1 else 2, len(names) // 2, squeeze=False)
    for axes, name in zip(panels[:2].flat, names, strict=True):
        lines(axes, [row for row in rows if row["series"] == name], most)
        axes.set_title(f"{name}: ms per picture")
        axes.set_ylim(bottom=0)
        if not name.endswith("batch"):
            axes.set_xlim(left=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    if most == 1:
        return
    for axes, kind in zip(panels[2], ("batch", "picture size"), strict=True):
        for name in [name for name in names if name.endswith(kind)]:
            for who in dict.fromkeys(row["who"] for row in rows):
                series = [row for row in rows if row["series"] == name and row["who"] == who]
                one, all_ = ([r for r in series if r["threads"] == n] for n in (1, most))
                gains = [a["seconds"] / b["seconds"] for a, b in zip(one, all_, strict=True)]
                style = "-" if name.startswith("small") else ":"
                label = f"{name.partition(',')[0]}, {CONTENDERS[who].title.partition(',')[0]}"
                axes.plot(abscissa(axes, one), gains, style, marker="o", color=COLOURS[who], label=label)
        axes.set_title(f"time with 1 thread ÷ with {most}")
        axes.set_ylim(0, most + 0.7)  # room for the legend
        axes.axhline(most, color=INK, linewidth=1)
        if kind != "batch":
            axes.set_xlim(left=0)
        axes.grid(axis="y")
        axes.legend(fontsize=8, ncols=2, loc="upper center")


def lines(axes: Any, rows: list[Record], most: int) -> None:
    for who in dict.fromkeys(row["who"] for row in rows):
        for n in sorted({1, most}):
            series = [row for row in rows if row["who"] == who and row["threads"] == n]
            label = f"{CONTENDERS[who].title}, {n} thread{'s' if n > 1 else ''}"
            style = {"color": COLOURS[who], "linestyle": "-" if n == most else "--", "marker": "o", "label": label}
            axes.plot(abscissa(axes, series), [row["seconds"] / row["batch"] * 1e3 for row in series], **style)
    axes.grid(axis="y")


def abscissa(axes: Any, series: list[Record]) -> list[float]:
    """Batch sizes on a logarithmic axis, or thousands of pixels from zero on."""
    if series[0]["series"].endswith("batch"):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("batch")
        return [row["batch"] for row in series]
    axes.set_xlabel(f"thousand pixels of a picture (batch {series[0]['batch']})")
    return [row["size"] ** 2 / 1000 for row in series]


def profile(figure: Any, profiles: dict[str, Record]) -> None:
    """The milliseconds of each kernel; the title has the time of the step and of its matrix products alone."""
    most = max(sum(k["share"] >= 0.005 for k in p["kernels"]) for p in profiles.values())
    figure.set_size_inches(9, 1.5 + 0.27 * most)
    for axes, (name, p) in zip(figure.subplots(1, len(profiles), squeeze=False)[0], profiles.items(), strict=True):
        kernels = [k for k in p["kernels"] if k["share"] >= 0.005]
        axes.barh([k["name"] for k in kernels], [k["ms"] for k in kernels], 0.75, color=COLOURS["ours"])
        for i, kernel in enumerate(kernels):
            axes.text(kernel["ms"], i, f" {kernel['share']:.0%}", va="center", fontsize=9)
        axes.set_xlim(0, max(k["ms"] for k in kernels) * 1.15)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms of a training step")
        axes.set_title(
            f"{name}, batch {p['batch']}: {p['step_ms']:.0f} ms;\n"
            f"its products alone {p['products_alone_ms']:.0f} ({p['gflops_alone']:.0f} GFLOP/s)",
            x=-0.4 if len(profiles) > 1 else 0,
        )


PLOTS: dict[str, Any] = {"compare": comparison, "growth": growth, "profile": profile}
PLOTS |= {"compare_gpu": comparison, "profile_gpu": profile}
