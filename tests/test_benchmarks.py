"""The benchmarks run, and what they say has the right form; how long anything takes is no test."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plain_loops
import pytest
from tiny_benchmark import TINY, Run

import benchmarks.__main__ as command
from benchmarks import measure, plots, profiling
from benchmarks.measure import MEASURES, PEERS, WORKLOADS, Job, Workload
from benchmarks.ours import Ours
from inception.models import create_model
from minigrad import num_threads, set_num_threads
from minigrad.kernels import numpy_


@pytest.fixture
def network() -> Iterator[Ours]:
    before = num_threads()
    tiny = Ours(TINY)
    tiny.set_threads(1)
    yield tiny
    set_num_threads(before)


def test_compare_prints_every_measure(run: Run) -> None:
    code, out, _ = run("--quick", "--workload", "small", "--threads", 1)
    assert code == 0
    assert "nothing to compare with" in out
    rows = [line for line in out.splitlines() if line.startswith("small, batch 2 ")]
    titles = ("training step", "forward", "evaluation")
    assert [title for title, row in zip(titles, rows, strict=True) if title in row] == [*titles]


def test_report_writes_all_parts(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--quick", "--workload", "small", "--threads", 2, "--models", "googlenet_small"]
    code, out, err = run(*options, "--report", tmp_path / "new")
    assert (code, err) == (0, "")
    parts = json.loads((tmp_path / "new/results.json").read_text())
    assert [*parts] == [*command.PARTS]
    for part in parts.values():
        assert {"machine", "quick", "threads", "default_malloc", "minutes", "found"} == set(part)
    results = {name: part["found"] for name, part in parts.items()}
    assert {row["measure"] for row in results["compare"]} == set(MEASURES)
    assert {(r["size"], r["batch"], r["threads"]) for r in results["growth"]} == {
        (size, batch, n) for size, batch in ((8, 1), (8, 2), (12, 2)) for n in (1, 2)
    }
    assert results["memory"][0]["kept"]["ours"] > 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["growth.png", "profile.png", "results.json"]
    assert "kept for backward" in out


def test_comparison_is_drawn_with_peers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"workload": "small", "measure": measure, "who": who, "ratio_seconds": 0.5, "ratio_mb": 1.5}
        for measure in MEASURES
        for who in PEERS
    ]
    written = plots.draw({"compare": {"found": rows, "machine": measure.machine(), "quick": True}}, tmp_path)
    assert [path.name for path in written] == ["compare.png"]
    assert written[0].stat().st_size > 5000


def test_the_family_is_kept_row_by_row(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One network is measured, the second interrupted. What the report held of other parts stays."""
    pytest.importorskip("matplotlib")
    earlier = {"memory": {"machine": measure.machine(), "quick": False, "found": []}}
    (tmp_path / "results.json").write_text(json.dumps(earlier))

    def start(job: Job) -> list[measure.Record]:
        if job.works[0].model == "inception_v3":
            assert job.works == [Workload("inception_v3", 299, 1000, 2, heads=True)]
            raise KeyboardInterrupt
        return measure.start(job)

    monkeypatch.setattr(command, "start", start)
    code, out, err = run("family", "--quick", "--models", "googlenet_small", "inception_v3", "--report", tmp_path)
    assert (code, err) == (130, f"stopped; what was measured is in {tmp_path / 'results.json'}\n")
    parts = json.loads((tmp_path / "results.json").read_text())
    assert parts["memory"] == earlier["memory"]
    (row,) = parts["family"]["found"]
    assert (row["model"], row["size"], row["batch"], row["classes"]) == ("googlenet_small", 32, 2, 10)
    assert list(row["seconds"]) == ["forward", "backward", "update"]
    assert all(seconds > 0 for seconds in row["seconds"].values())
    weights = 4 * 260_650 / 2**20  # and as much again for the gradients and for the momentum
    assert 3 * weights < row["mb"] - row["bare_mb"] < 400
    *_, head, rule, line = out.strip().splitlines()
    assert head.count("|") == rule.count("|") == line.count("|") == 8
    assert line.startswith("| `googlenet_small` | 2×32×32 | ")


@pytest.mark.parametrize("content", ["", "[1]", '{"machine": {}, "compare": []}'])
def test_another_file_is_not_written_over(run: Run, tmp_path: Path, content: str) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(content)
    code, _, err = run("memory", "--quick", "--report", tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert "results.json was not written by this program: move it away" in err
    assert (tmp_path / "results.json").read_text() == content


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"threads": 1, "quick": False, "default_malloc": False, "python": sys.executable} | given
    )


class Script:
    """In place of a process: what its calls take, two for warming up first."""

    def __init__(self, seconds: dict[str, list[float]], ended: list[str]):
        self.seconds, self.ended, self.who = {who: iter([9.0, 9.0, *s] * 3) for who, s in seconds.items()}, ended, ""

    def __call__(self, job: Job) -> Script:
        copy = Script({}, self.ended)
        copy.who, copy.seconds = job.who, self.seconds
        return copy

    def ask(self, measure_: str) -> measure.Record:
        if self.who not in self.seconds:
            raise measure.Failed("no C++ compiler")
        return {"measure": measure_, "who": self.who, "seconds": next(self.seconds[self.who]), "mb": 1, "start_mb": 1}

    def end(self) -> None:
        self.ended.append(self.who)


def test_ratios_are_of_neighbouring_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times, ended = {"ours": [1.0, 20.0, 3.0], "torch": [2.0, 10.0, 3.0], "torch_channels_last": [4.0, 5.0, 1.5]}, []
    monkeypatch.setattr(command, "InTurn", Script(times, ended))
    rows = command.compare({"small": TINY}, list(times), arguments(rounds=3))
    assert [row["who"] for row in rows] == [*times] * 3  # for step, forward and evaluation
    assert [row["seconds"] for row in rows[:3]] == [3.0, 3.0, 4.0]
    assert [row["ratio_seconds"] for row in rows[:3]] == [1.0, 1.0, 2.0]  # medians of (0.5, 2, 1) and (0.25, 4, 2)
    assert [row["best_eager"] for row in rows[:3]] == [False, True, False]
    assert ended == [*times]


def test_compile_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[str] = []
    monkeypatch.setattr(command, "InTurn", Script({"ours": [1.0, 1.0]}, ended))
    rows = command.compare({"small": TINY}, ["ours", "torch_compile"], arguments(rounds=2))
    assert [row["who"] for row in rows] == ["ours"] * 3
    assert capsys.readouterr().out == "torch.compile does not work here: no C++ compiler\n"
    assert ended == ["torch_compile", "ours"]


def test_a_network_that_takes_turns_says_why_it_cannot(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{sys.executable} -c \"print('words ' * 50000)\" >&2\necho no room >&2\nexit 3\n")
    python.chmod(0o755)
    broken = measure.InTurn(Job("ours", [TINY], [1], [], 1, python=str(python)))
    with pytest.raises(measure.Failed, match="minigrad, googlenet_small: no room"):
        broken.ask("step")
    broken.end()


def test_compare_takes_those_that_are_wanted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed", lambda: ["ours", "torch"])
    code, out, _ = run("compare", "--quick", "--workload", "small", "--who", "ours")
    assert code == 0
    assert "minigrad" in out
    assert "PyTorch" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["speed"], "there is no part 'speed': choose from compare, profile, growth, memory, family"),
        (["--threads", "0"], "'0' is not a whole number of at least 1"),
        (["--batch", "x"], "'x' is not a whole number of at least 1"),
        (["--device", "first"], "'first' is not the number of a GPU: 0, 1, …"),
        (["--precision", "tf32"], "--device, --precision and --no-tests are for --backend cupy"),
        (
            ["--python", "python3.13t", "--backend", "cupy"],
            "--python, --compile, --default-malloc and --models are",
        ),
        (["--compile", "--backend", "cupy"], "--python, --compile, --default-malloc and --models are"),
        (["--device", "0"], "--device, --precision and --no-tests are for --backend cupy"),
        (["--who", "ours_tf32"], "there is no network to compare 'ours_tf32': choose from ours, torch, torch_channels"),
        (["--who", "torch_compile"], "--who torch_compile needs --compile, since compiling"),
        (
            ["growth", "--backend", "cupy"],
            "there is no part on a GPU 'growth': choose from environment, ceilings, compare, profile, tests, "
            "memory_check",
        ),
    ],
)
def test_mistakes_get_one_sentence(run: Run, arguments: list[str], sentence: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert sentence in err.splitlines()[-1]


def test_report_without_matplotlib_fails_before_measuring(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    code, out, err = run("--report", tmp_path / "new")
    assert (code, out) == (1, "")
    assert "pip install matplotlib" in err
    assert not (tmp_path / "new").exists()


def test_a_process_that_fails_is_quoted() -> None:
    with pytest.raises(measure.Failed, match="PyTorch"):
        measure.start(Job("torch", [TINY._replace(classes=-1)], [1], ["step"], 1))


def test_minigrad_runs_in_the_interpreter_that_is_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$1" >> {marker}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(command, "installed", lambda: ["ours"])
    code, out, err = run("family", "--models", "googlenet_small", "--quick", "--batch", "2", "--python", python)
    assert (code, err) == (0, "")
    assert marker.read_text().split() == ["-c", "-m"]  # asked for its versions, then measured
    assert f"'python': '{platform.python_version()}" in out.split("versions_of_minigrad")[1]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (None, "python cannot be run: No such file or directory"),
        (
            "#!/bin/sh\necho \"No module named 'numpy'\" >&2; exit 1",
            "python cannot run minigrad: No module named 'numpy'",
        ),
    ],
)
def test_an_interpreter_that_does_not_do(run: Run, tmp_path: Path, script: str | None, sentence: str) -> None:
    python = tmp_path / "python"
    if script:
        python.write_text(script)
        python.chmod(0o755)
    code, out, err = run("--python", python)
    assert (code, out) == (1, "")
    assert err.endswith(f"{sentence}\n")


def test_the_other_process_does_not_import_what_it_does_not_measure() -> None:
    code = "import sys, benchmarks.measure; assert not {'minigrad', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_kernels_are_counted_once(network: Ours) -> None:
    rows = {row["name"]: row for row in profiling.kernel_times(network, 1)}
    assert rows["concat"]["calls"] == 8
    assert rows["max_pool_dx"]["calls"] == 10
    assert {"update", "outside kernels"} <= set(rows)
    assert set(rows) - {"update", "outside kernels"} <= set(vars(numpy_)) & set(vars(plain_loops))
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in rows.values())


def test_layers_are_those_of_the_model(network: Ours) -> None:
    rows = [row for row in profiling.layer_rows(network, 1) if row["name"] != "outside the model"]
    names = [name for name, _ in create_model("googlenet_small").children()]
    assert [row["name"] for row in rows] == [name for name in names if name != "dropout"]  # which does nothing here
    assert all(row["forward_ms"] > 0 for row in rows)
    assert all(row["backward_ms"] > 0 for row in rows if row["name"].startswith(("conv", "inception", "fc")))


def test_products_are_all_of_a_step(network: Ours) -> None:
    result = profiling.product_times(network, 1, 1, 1.0)
    rows = result["products"]
    assert result["multiply_adds"] == sum(row["calls"] * row["count"] * row["m"] * row["k"] * row["n"] for row in rows)
    # The 1×1 units of every module's input, 16 + 32 + 16 filters in 3a: forward, dx and dw, at two images of 8×8.
    assert {(128, 64, 64)} <= {(row["m"], row["k"], row["n"]) for row in rows}
    assert all(row["gflops"] > 0 and row["gflops_alone"] > 0 for row in rows)


def test_plain_functions_are_back_after_a_profile(network: Ours) -> None:
    before = [getattr(place, name) for place, name in profiling.DOORS]
    profiling.product_times(network, 1, 1, 1.0)
    profiling.kernel_times(network, 1)
    assert before == [getattr(place, name) for place, name in profiling.DOORS]
    assert numpy_.concat.__name__ == "concat"
    assert not hasattr(numpy_.concat, "__wrapped__")


def test_sizes_of_products() -> None:
    def form(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple((shape, (0,) * len(shape), "<f4") for shape in shapes)

    assert profiling.Product("product", form((6, 4), (4, 3), (6, 3))).sizes == (1, 6, 4, 3)
    assert profiling.Product("product_of_transposed", form((6, 4), (6, 3))).sizes == (1, 4, 6, 3)
    assert profiling.Product("matmul", form((1, 5), (7, 5, 2))).sizes == (7, 1, 5, 2)


def test_replayed_operands_have_the_recorded_form() -> None:
    array = np.zeros((6, 8), np.float32)[:, 2:5]
    other = profiling.like(array.shape, array.strides, array.dtype.str)
    assert (other.shape, other.strides, other.dtype) == (array.shape, array.strides, array.dtype)
    np.testing.assert_array_equal(other, 1)


def test_kept_bytes_are_those_of_the_activations(network: Ours) -> None:
    one = network.kept_bytes()
    larger = Ours(TINY._replace(batch=6))
    assert 2 < larger.kept_bytes() / one < 3.5  # three times the pictures, the same filters


@pytest.mark.parametrize("work", [*WORKLOADS.values(), Workload("googlenet_bn", 64, 1000, 2)])
def test_peers_have_the_same_parameters(work: Workload) -> None:
    pytest.importorskip("torch")
    from benchmarks.peers import build

    model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
    theirs = build("torch", work._replace(batch=1)).model  # type: ignore[attr-defined]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.size for p in model.parameters())
