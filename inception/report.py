"""A run in pictures: curves, confusion matrix, accuracy per class, the worst mistakes. Drawing needs matplotlib.

What is drawn is computed by pure functions on NumPy arrays, which need nothing else. The same input gives the same
bytes, with the same matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception.files import FileError, replace_file
from minigrad.errors import MinigradError

Log = Sequence[Mapping[str, Any]]  # one row an epoch, by the keys of the run's log; None and NaN leave a gap

# Okabe and Ito's colours, told apart by the colour-blind too (Wong: Points of view, Nature Methods 8, 441, 2011).
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, LIGHT = "#222222", "#767676", "#E4E4E4"
WIDTH, DPI = 9.0, 150  # inches, so that 10 points are 14 pixels where the picture is shown 900 pixels wide
MANY = 20  # classes: with more, a cell of the confusion matrix has no room for a number


class ReportError(MinigradError, ValueError):
    """A report cannot be drawn: matplotlib is absent, or what is to be drawn does not fit together."""


# ---- What is drawn ----


class Mistake(NamedTuple):
    """A picture that was taken for something else."""

    row: int  # of the picture, among the probabilities
    label: int  # what it shows
    predicted: int  # what it was taken for
    probability: float  # given to that


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How many pictures of each class (row) were taken for each class (column): (K, K) int64.

    labels, predictions   (N,) ints in 0 … classes − 1
    raises                ReportError naming the first row that is out of range
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ReportError(f"confusion_matrix got labels {labels.shape} and predictions {predictions.shape}, wants (N,)")
    for name, values in (("label", labels), ("prediction", predictions)):
        _check_range(name, values, classes)
    counts = np.bincount(labels.astype(np.int64) * classes + predictions, minlength=classes * classes)
    return counts.reshape(classes, classes)


def per_class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The share of each class's pictures that were recognised: (K,) float64, NaN for a class without pictures."""
    counts = confusion.sum(axis=1)
    return np.where(counts > 0, np.diag(confusion) / np.maximum(counts, 1), np.nan)


def worst_mistakes(probabilities: np.ndarray, labels: np.ndarray, count: int) -> list[Mistake]:
    """The `count` mistakes of which the model was surest, the surest first; fewer if there are fewer.

    probabilities   (N, K), as softmax gives them
    labels          (N,) ints in 0 … K − 1
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ReportError(
            f"worst_mistakes got probabilities {probabilities.shape} and labels {labels.shape}, wants (N, K) and (N,)"
        )
    if not len(labels):
        return []
    _check_range("label", labels, probabilities.shape[1])
    if bad := np.flatnonzero(~np.isfinite(probabilities).all(axis=1)).tolist():
        raise ReportError(f"worst_mistakes got probabilities that are not finite in row {bad[0]}")
    predicted = probabilities.argmax(axis=1)
    sure = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-sure[wrong], kind="stable")][:count]
    return [Mistake(int(i), int(labels[i]), int(predicted[i]), float(sure[i])) for i in order]


def _check_range(name: str, values: np.ndarray, classes: int) -> None:
    if values.dtype.kind not in "iu":
        raise ReportError(f"{name}s must be whole numbers, got {values.dtype}")
    if (wrong := np.flatnonzero((values < 0) | (values >= classes))).size:
        raise ReportError(f"{name} {values[wrong[0]]} in row {wrong[0]} is none of {classes} classes")


# ---- The report ----


def write_report(
    directory: str | Path,
    log: Log,
    *,
    confusion: np.ndarray | None = None,
    classes: Sequence[str] = (),
    mistakes: Sequence[tuple[np.ndarray, Mistake]] = (),
) -> list[Path]:
    """Draw what is given into `directory`, which is made if need be, and return the files.

    log         one row an epoch -> curves.png: loss, accuracy, learning rate
    confusion   (K, K) of `confusion_matrix` -> confusion.png and classes.png
    classes     the K names; numbers if there are none
    mistakes    of `worst_mistakes`, each with its picture (H, W, 3) uint8 -> mistakes.png

    Files of these names are replaced, each at once; the others are left as they are.
    Raises ReportError if matplotlib is absent, if there is nothing to draw, or if sizes do not fit.
    """
    if confusion is not None:
        size = len(confusion)
        if confusion.shape != (size, size) or size == 0 or (classes and len(classes) != size):
            raise ReportError(f"a report got a confusion matrix {confusion.shape} and {len(classes)} class names")
    for picture, mistake in mistakes:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ReportError(
                f"a report got a mistake's picture {picture.dtype} {picture.shape}, wants (H, W, 3) uint8"
            )
        if classes and not 0 <= min(mistake.label, mistake.predicted) <= max(mistake[1:3]) < len(classes):
            raise ReportError(f"a report got {mistake}, but {len(classes)} class names")
    figures = {}
    with _style():
        if log:
            figures["curves.png"] = curves(log)
        if confusion is not None:
            names = list(classes) or [str(i) for i in range(len(confusion))]
            figures["confusion.png"] = confusion_figure(confusion, names)
            figures["classes.png"] = classes_figure(confusion, names)
        if mistakes:
            figures["mistakes.png"] = mistakes_figure(mistakes, classes)
        if not figures:
            raise ReportError("a report got nothing to draw: no epochs, no confusion matrix, no mistakes")
        return [_save(figure, Path(directory) / name) for name, figure in figures.items()]


def compare_runs(path: str | Path, logs: Mapping[str, Log]) -> Path:
    """Draw the test loss and accuracy of several runs, by name, into one file."""
    if not any(logs.values()):
        raise ReportError("compare_runs got no epochs of any run")
    with _style():
        figure = _figure(3.7)
        left, right = figure.subplots(1, 2)
        colours = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY)
        for i, (name, log) in enumerate(logs.items()):
            look: dict[str, Any] = {
                "color": colours[i % len(colours)],
                "linestyle": ("-", "--", ":")[i // len(colours) % 3],
            }
            watched = _watched(log)
            _line(left, log, f"{watched}_loss", name, **look)
            _line(right, log, f"{watched}_accuracy", name, scale=100, **look)
        left.set_ylim(bottom=0)
        _title(left, "Loss", "nats, held-out pictures")
        _title(right, "Accuracy", "%, held-out pictures")
        for axes in (left, right):
            _epochs(axes, [row for log in logs.values() for row in log])
        right.legend(loc="lower right")
        return _save(figure, Path(path))


def curves(log: Log) -> Any:
    """Loss, accuracy and learning rate over the epochs."""
    watched = _watched(log)
    figure = _figure(5.6)
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 1))
    loss, accuracy, rate = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    for axes, key, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        _line(axes, log, key, "training", scale=scale, color=SKY)
        _line(axes, log, f"{watched}_{key}", watched, scale=scale, color=BLUE)
        _line(axes, log, f"ema_{watched}_{key}", f"{watched}, averaged weights", scale=scale, color=ORANGE)
    heads = sorted({key for row in log for key in row if key.startswith("aux")})
    for i, head in enumerate(heads):
        _line(loss, log, head, f"training, {head}", color=(PURPLE, AMBER)[i % 2], linewidth=1.2)
    _line(rate, log, "lr", "learning rate", color=GREY)
    _title(loss, "Loss", "nats, mean over pictures")
    best, epoch, which = max(
        (
            (value, -epoch, which)
            for key, which in ((f"{watched}_accuracy", ""), (f"ema_{watched}_accuracy", ", averaged weights"))
            for epoch, value in _points(log, key)
            if math.isfinite(value)
        ),
        default=(math.nan, 0, ""),
    )
    _title(accuracy, "Accuracy", f"%, best {watched} {best:.2%} (epoch {-epoch:g}{which})" if epoch else "%")
    _title(rate, "Learning rate", "")
    for axes in (loss, accuracy, rate):
        _epochs(axes, log)
    loss.set_ylim(bottom=0)
    for axes in (loss, accuracy):
        if axes.lines:
            axes.legend(loc="best")
    rate.set_ylim(bottom=0)
    return figure


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> Any:
    """Rows are what the pictures show, columns what they were taken for; each row adds up to 100 %."""
    from matplotlib.colors import PowerNorm

    size = len(names)
    side = WIDTH if size <= 40 else 2 * WIDTH  # to be enlarged by the reader: 100 names are not legible otherwise
    figure = _figure(side * 0.9, side)
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    # The square root: most mistakes are a few per cent, and would all look white.
    shown = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if size <= MANY:
        for i, j in np.ndindex(size, size):
            if (share := shares[i, j]) > 0:
                text = "<1" if share < 0.01 else f"{min(100 * share, 99 if share < 1 else 100):.0f}"
                weight, colour = ("bold" if i == j else "normal"), ("white" if share > 0.35 else INK)
                axes.text(j, i, text, ha="center", va="center", color=colour, weight=weight, size=_font(size, 11))
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
    else:
        bar = figure.colorbar(
            shown, ax=axes, shrink=0.6, aspect=40, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], format="{x:.0%}"
        )
        bar.outline.set_visible(False)
    axes.grid(which="major", visible=False)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if size <= 200:
        labels = [_short(name, 20) for name in names]
        upright = {"rotation": 90, "ha": "center"} if size > MANY else {"rotation": 40, "ha": "right"}
        axes.set_xticks(range(size), labels, rotation_mode="default" if size > MANY else "anchor", **upright)
        axes.set_yticks(range(size), labels)
        axes.tick_params(labelsize=_font(size, 10) * side / WIDTH)
    axes.set_xlabel("what it was taken for")
    axes.set_ylabel("what it shows")
    off = np.where(np.eye(size, dtype=bool), 0, shares)
    pairs = [divmod(int(k), size) for k in np.argsort(-off, axis=None, kind="stable")[:2]]
    most = [
        f"{_short(names[i], 16)} taken for {_short(names[j], 16)} {off[i, j]:.0%}" for i, j in pairs if off[i, j] > 0
    ]
    gist = f"% of a row; most often: {', '.join(most)}" if most else "% of a row; no mistakes"
    _title(axes, "Confusion", gist)
    return figure


def classes_figure(confusion: np.ndarray, names: Sequence[str]) -> Any:
    """How well each class is recognised, the best first; of more than 100 classes the 50 best and the 50 worst."""
    shares, counts = per_class_accuracy(confusion), confusion.sum(axis=1)
    seen = np.flatnonzero(counts > 0)
    order = seen[np.argsort(-shares[seen], kind="stable")]
    overall = np.trace(confusion) / max(confusion.sum(), 1)
    half = math.ceil(len(order) / 2)
    parts = [order] if len(order) <= 25 else [order[:half], order[half:]] if half <= 50 else [order[:50], order[-50:]]
    figure = _figure(1.2 + 0.27 * max(len(parts[0]), 1))
    for k, (axes, part) in enumerate(zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True)):
        rows = range(len(part))
        axes.barh(rows, 100 * shares[part], color=BLUE, height=0.7)
        for row, i in zip(rows, part, strict=True):
            beside = {"xy": (100, row), "textcoords": "offset points", "va": "center", "size": 9}
            axes.annotate(f"{100 * shares[i]:.1f}", xytext=(34, 0), ha="right", **beside)
            axes.annotate(f"of {counts[i]:,}", xytext=(39, 0), color=GREY, **beside)
        axes.axvline(100 * overall, color=ORANGE, linewidth=1.2, clip_on=False)
        axes.set_yticks(rows, [_short(names[i], 22) for i in part])
        axes.set_ylim(max(len(part), 1) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines[:].set_visible(False)
        if k == 0:
            part_of = f"; the 50 best and the 50 worst of {len(order):,}" if len(order) > 100 else ""
            _title(
                axes, "Accuracy of each class", f"% of its pictures; the line is all together, {overall:.2%}{part_of}"
            )
    return figure


def mistakes_figure(mistakes: Sequence[tuple[np.ndarray, Mistake]], classes: Sequence[str] = ()) -> Any:
    """A sheet of pictures, each with what it shows, what it was taken for, and how sure the model was."""

    columns, gap, head, above = 5, 0.14, 0.62, 0.42  # inches: between pictures, over the sheet, over each picture
    side = (WIDTH - (columns + 1) * gap) / columns
    rows = math.ceil(len(mistakes) / columns)
    width, height = WIDTH, head + rows * (above + side) + gap
    figure = _figure(height, layout=None)

    def text(x: float, y: float, words: str, **look: Any) -> None:
        figure.text(x / width, 1 - y / height, words, va="baseline", **look)

    def name(index: int) -> str:
        return _short(classes[index] if classes else str(index), 16)

    text(gap, 0.3, "The surest mistakes", weight="bold", size=11)
    text(gap, 0.53, "what it shows, and → what it was taken for, with its probability", size=9, color=GREY)
    for i, (picture, mistake) in enumerate(mistakes):
        x, y = gap + i % columns * (side + gap), head + (i // columns + 1) * (above + side)  # its lower left corner
        axes = figure.add_axes((x / width, 1 - y / height, side / width, side / height))
        axes.imshow(picture, interpolation="nearest" if max(picture.shape[:2]) < 100 else "antialiased")
        axes.set_anchor("SW")
        axes.set_axis_off()
        text(x, y - side - 0.22, name(mistake.label), weight="bold", size=9)
        text(x, y - side - 0.06, f"→ {name(mistake.predicted)} {mistake.probability:.0%}", color=ORANGE, size=9)
    return figure


# ---- Drawing ----


def matplotlib_() -> Any:
    """matplotlib, which is imported here first. Raises ReportError if it is absent: ask before a long training."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ReportError("drawing a report needs matplotlib: pip install matplotlib") from None
    return matplotlib


@contextmanager
def _style() -> Iterator[None]:
    """Draw in the style of this file, whatever the user's own settings are."""
    matplotlib = matplotlib_()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 10,
                "text.color": INK,
                "text.parse_math": False,  # a class may be called "$"
                "axes.edgecolor": GREY,
                "axes.labelcolor": GREY,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": LIGHT,
                "xtick.color": GREY,
                "ytick.color": GREY,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "ytick.major.size": 0,
                "figure.constrained_layout.w_pad": 0.1,
                "figure.constrained_layout.h_pad": 0.1,
                "lines.linewidth": 1.8,
                "legend.frameon": False,
                "legend.fontsize": 9,
            }
        )
        yield


def _figure(height: float, width: float = WIDTH, *, layout: Any = "constrained") -> Any:
    """A figure of its own: no window, and none of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


@contextmanager
def drawing(path: Path, width: float = WIDTH, height: float = 5.0) -> Iterator[Any]:
    """A matplotlib figure of so many inches in the style of this file, written to `path` as PNG when the block ends.

    Raises ReportError if matplotlib is absent, or the file cannot be written.
    """
    with _style():
        figure = _figure(height, width)
        yield figure
        _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG: the new file takes the old one's place at once, or nothing changes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None}))
    except FileError as error:
        raise ReportError(str(error)) from None
    except OSError as error:
        raise ReportError(f"{path} could not be written ({error.strerror or error})") from None
    return path


def _watched(log: Log) -> str:
    """What the log calls the pictures that were evaluated: "test", or "validation"."""
    return "validation" if any("validation_loss" in row for row in log) else "test"


def _points(log: Log, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of each row, the value NaN where there is none."""
    points = []
    for i, row in enumerate(log, 1):
        value = row.get(key)
        try:
            points.append((float(row.get("epoch", i)), math.nan if value is None else float(value)))
        except (TypeError, ValueError):
            raise ReportError(f"row {i} of the log: epoch or {key} is no number ({value!r})") from None
    return points


def _line(axes: Any, log: Log, key: str, label: str, *, scale: float = 1, **look: Any) -> None:
    """Draw one column of the log, if it holds any number; dots while the epochs are few enough to be told apart."""
    points = _points(log, key)
    if any(math.isfinite(value) for _, value in points):
        marker = {"marker": "o", "markersize": 3.5} if len(points) <= 25 else {}
        axes.plot([x for x, _ in points], [scale * y for _, y in points], label=label, **marker, **look)


def _epochs(axes: Any, log: Log) -> None:
    """Whole epochs as ticks."""
    from matplotlib.ticker import MaxNLocator

    epochs = [x for x, _ in _points(log, "epoch")]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    margin = 0.02 * (max(epochs) - min(epochs)) or 0.5
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    axes.set_xlabel("epoch")


def _title(axes: Any, title: str, about: str) -> None:
    """What is drawn, and below it, in grey, its unit and its gist."""
    axes.set_title(title, loc="left", weight="bold", size=11, pad=21 if about else 8)
    axes.annotate(about, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", size=9, color=GREY)


def _short(name: str, length: int) -> str:
    name = name.encode("utf-8", "replace").decode()  # of a folder whose name is in another encoding
    return name if len(name) <= length else name[: length - 1] + "…"


def _font(size: int, most: float) -> float:
    """Points that fit a cell of a matrix of `size` rows on WIDTH inches."""
    return min(most, 0.6 * 72 * 0.7 * WIDTH / size)
