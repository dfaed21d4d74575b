"""The report: what is drawn is right, and what cannot be drawn is said."""

from __future__ import annotations

import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inception import report
from inception.report import (
    Mistake,
    ReportError,
    compare_runs,
    confusion_matrix,
    per_class_accuracy,
    worst_mistakes,
    write_report,
)

NAMES = ("cat", "dog", "a name that is longer than there is room for", "$x^2$ <&> %")


def row(epoch: int, **more: Any) -> dict[str, Any]:
    """As the log of a run has it."""
    plain = {"epoch": epoch, "step": 10 * epoch, "lr": 0.1 / epoch, "loss": 2.0 / epoch, "accuracy": 0.1 * epoch}
    test = {"test_loss": 2.1 / epoch, "test_accuracy": 0.09 * epoch}
    return {**plain, **test, "seconds": 3.0, "pictures_per_second": 100.0, **more}


def counts(classes: int = 4) -> np.ndarray:
    labels = np.arange(5 * classes) % classes
    return confusion_matrix(labels, np.where(np.arange(len(labels)) % 3, labels, (labels + 1) % classes), classes)


def picture(value: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture
def styled() -> Any:
    """Figures can be drawn."""
    pytest.importorskip("matplotlib")
    with report._style():
        yield


# ---- What is drawn ----


def test_confusion_matrix_counts_each_picture_once() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    found = confusion_matrix(labels, predictions, 5)
    expected = np.zeros((5, 5), np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64
    assert confusion_matrix(labels[:0], predictions[:0], 3).tolist() == [[0] * 3] * 3


def test_confusion_matrix_of_narrow_ints_and_many_classes() -> None:
    """label·K + prediction must not wrap in the labels' own type."""
    labels = np.array([200, 199], np.uint8)
    found = confusion_matrix(labels, labels[::-1], 201)
    assert found[200, 199] == found[199, 200] == 1
    assert found.sum() == 2


@pytest.mark.parametrize(
    ("labels", "predictions", "says"),
    [
        ([0, 3], [0, 1], "label 3 in row 1 is none of 3 classes"),
        ([0, 1], [-1, 1], "prediction -1 in row 0"),
        ([0, 1], [0], r"labels \(2,\) and predictions \(1,\)"),
        ([0.0, 1.0], [0, 1], "labels must be whole numbers, got float64"),
    ],
)
def test_confusion_matrix_refuses(labels: list[float], predictions: list[int], says: str) -> None:
    with pytest.raises(ReportError, match=says):
        confusion_matrix(np.array(labels), np.array(predictions), 3)


def test_per_class_accuracy() -> None:
    found = per_class_accuracy(np.array([[3, 1, 0], [0, 0, 0], [2, 0, 0]]))
    np.testing.assert_array_equal(found, [0.75, np.nan, 0.0])


def test_worst_mistakes_come_the_surest_first() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.1, 0.3, 0.6], [0, 0.8, 0.2], [0.5, 0.2, 0.3]])
    labels = np.array([0, 0, 0, 2, 1])  # the first is right; the second and fourth are equally sure
    worst = [Mistake(1, 0, 1, 0.8), Mistake(3, 2, 1, 0.8), Mistake(2, 0, 2, 0.6), Mistake(4, 1, 0, 0.5)]
    assert worst_mistakes(probabilities, labels, 10) == worst
    assert worst_mistakes(probabilities, labels, 2) == worst[:2]
    assert worst_mistakes(probabilities[:1], labels[:1], 3) == []
    assert worst_mistakes(probabilities[:0], labels[:0], 3) == []


@pytest.mark.parametrize(
    ("probabilities", "labels", "says"),
    [
        ([[0.5, 0.5], [np.nan, 0.5]], [0, 1], "not finite in row 1"),
        ([[0.5, 0.5]], [2], "label 2 in row 0 is none of 2 classes"),
        ([[0.5, 0.5]], [0, 1], r"probabilities \(1, 2\) and labels \(2,\)"),
    ],
)
def test_worst_mistakes_refuses(probabilities: list[list[float]], labels: list[int], says: str) -> None:
    with pytest.raises(ReportError, match=says):
        worst_mistakes(np.array(probabilities), np.array(labels), 1)


# ---- Curves ----


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_show_every_column(styled: None) -> None:
    log = [row(e, aux1=3.0 / e, aux2=2.5 / e, ema_test_loss=1.0, ema_test_accuracy=0.2 * e) for e in (1, 2, 3)]
    log[0] |= {"ema_test_loss": None, "ema_test_accuracy": None}  # the first epoch had no average
    loss, accuracy, rate = report.curves(log).axes
    found = lines(loss)
    assert list(found) == ["training", "test", "test, averaged weights", "training, aux1", "training, aux2"]
    assert found["training"] == ([1, 2, 3], [2.0, 1.0, 2.0 / 3])
    assert found["test"][1] == [2.1 / e for e in (1, 2, 3)]
    assert found["training, aux2"][1] == [2.5 / e for e in (1, 2, 3)]
    assert math.isnan(found["test, averaged weights"][1][0])
    assert found["test, averaged weights"][1][1:] == [1.0, 1.0]
    assert lines(accuracy)["test"][1] == pytest.approx([9, 18, 27])  # per cent
    assert "best test 60.00% (epoch 3, averaged weights)" in accuracy.texts[0].get_text()
    assert lines(rate)["learning rate"][1] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert {text.get_text() for text in accuracy.get_legend().texts} == set(lines(accuracy))


def test_curves_leave_out_what_the_log_lacks(styled: None) -> None:
    log = [{"epoch": e, "lr": 0.1, "loss": 1.0, "accuracy": 0.5} for e in (4, 5)]
    loss, accuracy, _ = report.curves(log).axes
    assert list(lines(loss)) == list(lines(accuracy)) == ["training"]
    assert accuracy.texts[0].get_text() == "%"


def test_curves_of_a_run_with_validation(styled: None) -> None:
    log = [{"epoch": 1, "loss": 1.0, "validation_loss": 1.5, "validation_accuracy": 0.25}]
    loss, accuracy, _ = report.curves(log).axes
    assert lines(loss)["validation"] == ([1], [1.5])
    assert "best validation 25.00% (epoch 1)" in accuracy.texts[0].get_text()


def test_the_best_of_two_equal_epochs_is_the_first(styled: None) -> None:
    log = [row(e, test_accuracy=a) for e, a in ((1, 0.5), (2, 0.7), (3, 0.7), (4, math.nan))]
    assert "70.00% (epoch 2)" in report.curves(log).axes[1].texts[0].get_text()


def test_a_log_with_words_in_it_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ReportError, match=r"row 2 of the log: epoch or loss is no number \('high'\)"):
        write_report(tmp_path, [row(1), row(2, loss="high")])
    assert list(tmp_path.iterdir()) == []


# ---- The other figures ----


def test_confusion_shows_shares_of_each_row(styled: None) -> None:
    confusion = np.array([[999, 1, 0], [100, 250, 150], [0, 0, 0]])
    axes = report.confusion_figure(confusion, ["a", "b", "c"]).axes[0]
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, [[0.999, 0.001, 0], [0.2, 0.5, 0.3], [0, 0, 0]])
    written = {text.get_position(): text.get_text() for text in axes.texts[:-1]}
    assert written == {(0, 0): "99", (1, 0): "<1", (0, 1): "20", (1, 1): "50", (2, 1): "30"}  # (column, row)
    assert axes.texts[-1].get_text() == "% of a row; most often: b taken for c 30%, b taken for a 20%"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_a_perfect_confusion(styled: None) -> None:
    axes = report.confusion_figure(np.diag([3, 4]), ["a", "b"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["100", "100", "% of a row; no mistakes"]


def test_many_classes_get_no_numbers_but_a_scale(styled: None) -> None:
    figure = report.confusion_figure(counts(100), [str(i) for i in range(100)])
    axes, scale = figure.axes
    assert len(axes.texts) == 1
    assert len(axes.get_xticklabels()) == 100
    assert "100%" in [label.get_text() for label in scale.get_yticklabels()]


def test_classes_are_sorted_and_those_without_pictures_left_out(styled: None) -> None:
    confusion = np.array([[1, 1, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [4, 0, 0, 1]])
    (axes,) = report.classes_figure(confusion, ["a", "b", "c", "d"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "d"]
    assert [bar.get_width() for bar in axes.patches] == [100, 50, 20]
    assert [text.get_text() for text in axes.texts[:-1]] == ["100.0", "of 3", "50.0", "of 2", "20.0", "of 5"]
    assert "all together, 50.00%" in axes.texts[-1].get_text()


@pytest.mark.parametrize(("classes", "columns"), [(25, [25]), (26, [13, 13]), (100, [50, 50]), (300, [50, 50])])
def test_many_classes_stand_in_two_columns(styled: None, classes: int, columns: list[int]) -> None:
    figure = report.classes_figure(counts(classes), [str(i) for i in range(classes)])
    assert [len(axes.patches) for axes in figure.axes] == columns
    assert ("of 300" in figure.axes[0].texts[-1].get_text()) == (classes > 100)
    widths = [bar.get_width() for axes in figure.axes for bar in axes.patches]
    assert widths == sorted(widths, reverse=True)


def test_mistakes_show_their_pictures_with_names(styled: None) -> None:
    wrong = [(picture(i, (8, 8 + i)), Mistake(i, 0, 1 + i % 2, 0.9 - 0.1 * i)) for i in range(7)]
    figure = report.mistakes_figure(wrong, NAMES)
    assert [axes.images[0].get_array().max() for axes in figure.axes] == list(range(7))
    words = [text.get_text() for text in figure.texts]
    assert words[2:6] == ["cat", "→ dog 90%", "cat", "→ a name that is … 80%"]
    places = [tuple(axes.get_position().bounds[:2]) for axes in figure.axes]
    assert len(set(places)) == 7  # two rows, none on another
    assert all(0 <= x < 1 and 0 <= y < 1 for x, y in places)


# ---- The files ----


def test_write_report_writes_all(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    settings = dict(matplotlib.rcParams)
    out = tmp_path / "run" / "report"
    wrong = [(picture(9), Mistake(0, 1, 2, 0.7))]
    files = write_report(out, [row(1)], confusion=counts(), classes=NAMES, mistakes=wrong)
    assert [path.name for path in files] == ["curves.png", "confusion.png", "classes.png", "mistakes.png"]
    assert sorted(out.iterdir()) == sorted(files)  # and nothing else
    for path in files:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20]) == (1350,)
    assert dict(matplotlib.rcParams) == settings


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the user's own settings are."""
    matplotlib = pytest.importorskip("matplotlib")
    wrong = [(picture(9), Mistake(0, 1, 2, 0.7))]
    first = write_report(tmp_path / "a", [row(1), row(2)], confusion=counts(), mistakes=wrong)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        again = write_report(tmp_path / "b", [row(1), row(2)], confusion=counts(), mistakes=wrong)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    other = write_report(tmp_path / "c", [row(1), row(2, loss=1.5)])
    assert other[0].read_bytes() != first[0].read_bytes()


def test_only_what_is_given_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "confusion.png").write_bytes(b"old")
    assert [path.name for path in write_report(tmp_path, [row(1)])] == ["curves.png"]
    assert (tmp_path / "confusion.png").read_bytes() == b"old"
    with pytest.raises(ReportError, match="nothing to draw"):
        write_report(tmp_path, [])


@pytest.mark.parametrize(
    ("confusion", "classes"), [(np.zeros((2, 3)), ()), (counts(), NAMES[:3]), (np.zeros((0, 0)), ())]
)
def test_a_confusion_that_does_not_fit_is_refused(tmp_path: Path, confusion: np.ndarray, classes: Any) -> None:
    with pytest.raises(ReportError, match=r"confusion matrix \(\d, \d\) and \d class names"):
        write_report(tmp_path, [row(1)], confusion=confusion, classes=classes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shown", "mistake", "says"),
    [
        (picture(1)[..., 0], Mistake(0, 0, 1, 0.5), r"picture uint8 \(8, 8\), wants \(H, W, 3\) uint8"),
        (picture(1).astype(float), Mistake(0, 0, 1, 0.5), r"picture float64 \(8, 8, 3\)"),
        (picture(1), Mistake(0, 0, 4, 0.5), r"Mistake\(row=0, label=0, predicted=4.*but 4 class names"),
    ],
)
def test_a_mistake_that_does_not_fit_is_refused(tmp_path: Path, shown: np.ndarray, mistake: Mistake, says: str) -> None:
    with pytest.raises(ReportError, match=says):
        write_report(
            tmp_path, [row(1)], classes=NAMES, mistakes=[(picture(1), Mistake(0, 3, 0, 0.5)), (shown, mistake)]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"file/curves\.png could not be written \("):
        write_report(tmp_path / "file", [row(1)])


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=r"pip install matplotlib"):
        write_report(tmp_path / "new", [row(1)])
    assert not (tmp_path / "new").exists()
    assert confusion_matrix(np.array([0]), np.array([0]), 1).tolist() == [[1]]  # needs nothing


def test_compare_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure) or path)
    logs = {"small": [row(1), row(2)], "with validation": [{"epoch": 1, "validation_loss": 1.0}], "empty": []}
    assert compare_runs(tmp_path / "runs.png", logs) == tmp_path / "runs.png"
    loss, accuracy = drawn[0].axes
    assert lines(loss) == {"small": ([1, 2], [2.1, 1.05]), "with validation": ([1], [1.0])}
    assert list(lines(accuracy)) == ["small"]
    monkeypatch.undo()
    assert compare_runs(tmp_path / "runs.png", logs).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ReportError, match="no epochs"):
        compare_runs(tmp_path / "runs.png", {"a": []})


def test_a_name_in_another_encoding_is_drawn(tmp_path: Path) -> None:
    """As Python gives it for a folder called caf\xe9: matplotlib would end the run with a TypeError."""
    names = [os.fsdecode(b"caf\xe9"), "tea"]
    confusion = np.array([[3, 1], [0, 4]])
    files = write_report(tmp_path, [], confusion=confusion, classes=names)
    assert all(path.stat().st_size > 1000 for path in files)
