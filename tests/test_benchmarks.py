"""The benchmarks run, and what they say has the right form; how long anything takes is no test."""

from __future__ import annotations

import argparse
import ast
import graphlib
import json
import platform
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plain_loops
import pytest
from tiny_benchmark import TINY, Run

import benchmarks.__main__ as command
import minigrad
from benchmarks import compare, engines, host_profile, ours, parts, plots, processes, results, tables
from benchmarks.machine import folder_name, machine
from benchmarks.ours import Ours
from benchmarks.vocabulary import HOST, MEASURES, WORKLOADS, Failed, Job, Record, Workload
from inception.models import create_model
from minigrad import Tensor, no_grad, num_threads, set_num_threads, summary
from minigrad.kernels import kernels
from minigrad.layout import Window


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
    rows = [line for line in out.splitlines() if line.startswith("small, batch 2, 1 thread ")]
    titles = ("training step", "forward", "evaluation")
    assert [title for title, row in zip(titles, rows, strict=True) if title in row] == [*titles]


def test_report_writes_all_parts(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--quick", "--workload", "small", "--threads", 2, "--models", "googlenet_small"]
    code, out, err = run(*options, "--report", tmp_path / "new")
    assert (code, err) == (0, "")
    folder = tmp_path / "new" / folder_name(machine())
    found = json.loads((folder / "results.json").read_text())
    assert [*found] == [*command.PARTS]
    for part in found.values():
        assert {"machine", "quick", "threads", "default_malloc", "minutes", "found"} == set(part)
    rows = {name: part["found"] for name, part in found.items()}
    assert {row["measure"] for row in rows["compare"]} == set(MEASURES)
    assert {(r["size"], r["batch"], r["threads"]) for r in rows["growth"]} == {
        (size, batch, n) for size, batch in ((8, 1), (8, 2), (12, 2)) for n in (1, 2)
    }
    assert rows["memory"][0]["kept"]["ours"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["growth.png", "profile.png", "results.json"]
    assert "kept for backward" in out


def test_comparison_is_drawn_with_peers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"workload": "small", "batch": 2, "measure": measure, "who": who, "ratio_seconds": 0.5, "ratio_mb": 1.5}
        for measure in MEASURES
        for who in HOST
    ]
    written = plots.draw({"compare": {"found": rows, "machine": machine(), "quick": True}}, tmp_path)
    assert [path.name for path in written] == ["compare.png"]
    assert written[0].stat().st_size > 5000


def test_the_family_is_kept_row_by_row(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One network is measured, the second interrupted. What the report held of other parts stays."""
    pytest.importorskip("matplotlib")
    earlier = {"memory": {"machine": machine(), "quick": False, "found": []}}
    path = tmp_path / folder_name(machine()) / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(earlier))

    def start(job: Job) -> list[Record]:
        if job.works[0].model == "inception_v3":
            assert job.works == [Workload("inception_v3", 299, 1000, 2, heads=True)]
            raise KeyboardInterrupt
        return processes.start(job)

    monkeypatch.setattr(parts, "start", start)
    code, out, err = run("family", "--quick", "--models", "googlenet_small", "inception_v3", "--report", tmp_path)
    assert (code, err) == (130, f"stopped; {path} has what was measured\n")
    found = json.loads(path.read_text())
    assert found["memory"] == earlier["memory"]
    (row,) = found["family"]["found"]
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
    path = tmp_path / folder_name(machine()) / "results.json"
    path.parent.mkdir()
    path.write_text(content)
    code, _, err = run("memory", "--quick", "--report", tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert "results.json was not written by this program: move it away" in err
    assert path.read_text() == content


def arguments(**given: Any) -> argparse.Namespace:
    defaults = {"threads": [1], "quick": False, "default_malloc": False, "python": sys.executable, "against": None}
    return argparse.Namespace(**defaults | {"measures": None} | given)


class Script:
    """In place of a process: what its calls take, two for warming up first."""

    def __init__(self, seconds: dict[str, list[float]], ended: list[str]):
        self.seconds, self.ended, self.who = {who: iter([9.0, 9.0, *s] * 3) for who, s in seconds.items()}, ended, ""

    def __call__(self, job: Job) -> Script:
        copy = Script({}, self.ended)
        copy.who, copy.seconds = job.who, self.seconds
        return copy

    def ask(self, measure: str) -> Record:
        if self.who not in self.seconds:
            raise Failed("PyTorch, compiled: no C++ compiler")
        return {"measure": measure, "who": self.who, "seconds": next(self.seconds[self.who]), "mb": 1, "start_mb": 1}

    def end(self) -> None:
        self.ended.append(self.who)


def test_ratios_are_of_neighbouring_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times, ended = {"ours": [1.0, 20.0, 3.0], "torch": [2.0, 10.0, 3.0], "torch_channels_last": [4.0, 5.0, 1.5]}, []
    monkeypatch.setattr(compare, "InTurn", Script(times, ended))
    (rows,) = compare.compare([("small", TINY)], list(times), arguments(rounds=3))
    assert [row["who"] for row in rows] == [*times] * 3  # for step, forward and evaluation
    assert [row["seconds"] for row in rows[:3]] == [3.0, 3.0, 4.0]
    assert [row["ratio_seconds"] for row in rows[:3]] == [1.0, 1.0, 2.0]  # medians of (0.5, 2, 1) and (0.25, 4, 2)
    assert [row["best_eager"] for row in rows[:3]] == [False, True, False]
    assert ended == [*times]


def test_compile_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[str] = []
    monkeypatch.setattr(compare, "InTurn", Script({"ours": [1.0, 1.0]}, ended))
    (rows,) = compare.compare([("small", TINY)], ["ours", "torch_compile"], arguments(rounds=2))
    assert [row["who"] for row in rows] == ["ours"] * 3
    assert capsys.readouterr().out == "left out: PyTorch, compiled: no C++ compiler\n"
    assert ended == ["torch_compile", "ours"]


def test_a_network_that_takes_turns_says_why_it_cannot(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{sys.executable} -c \"print('words ' * 50000)\" >&2\necho no room >&2\nexit 3\n")
    python.chmod(0o755)
    broken = processes.InTurn(Job("ours", [TINY], [1], [], 1, python=str(python)))
    with pytest.raises(Failed, match="minigrad, googlenet_small: no room"):
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
        (["--precision", "tf32"], "--precision is for --backend cupy"),
        (["--python", "python3.13t", "--backend", "cupy"], "--python is for --backend numpy"),
        (["--default-malloc", "--backend", "cupy"], "--default-malloc is for --backend numpy"),
        (["--against", ".", "--backend", "cupy"], "--against is for --backend numpy"),
        (["--device", "0"], "--device is for --backend cupy"),
        (["--who", "ours_tf32"], "there is no network to compare 'ours_tf32': choose from ours, torch, torch_channels"),
        (["--against", "nowhere"], "--against: nowhere is no checkout: it has no folder minigrad"),
        (["--full", "--batch", "1"], "--full chooses workloads, batches and threads: leave out --workload, --batch"),
        (
            ["growth", "--backend", "cupy"],
            "there is no part on a GPU 'growth': choose from environment, ceilings, compare, profile",
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
    with pytest.raises(Failed, match="PyTorch"):
        processes.start(Job("torch", [TINY._replace(classes=-1)], [1], ["step"], 1))


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
    assert marker.read_text().split() == ["-c", "-P"]  # asked for its versions, then measured
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
    code = "import sys, benchmarks.child; assert not {'minigrad', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_kernels_are_counted_once(network: Ours) -> None:
    rows = {row["name"]: row for row in host_profile.kernel_rows(*kernel_calls(network))}
    assert rows["concat"]["calls"] == 8
    assert rows["max_pool_dx"]["calls"] == 10
    assert {"update", "outside kernels"} <= set(rows)
    assert set(rows) - {"update", "outside kernels"} <= set(vars(kernels(np.empty(0)))) & set(vars(plain_loops))
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in rows.values())


def test_layers_are_those_of_the_model(network: Ours) -> None:
    rows = [row for row in host_profile.layer_rows(network, 1) if row["name"] != "outside the model"]
    names = [name for name, _ in create_model("googlenet_small").children()]
    assert [row["name"] for row in rows] == [name for name in names if name != "dropout"]  # which does nothing here
    assert all(row["forward_ms"] > 0 for row in rows)
    assert all(row["backward_ms"] > 0 for row in rows if row["name"].startswith(("conv", "inception", "fc")))


def test_products_are_all_of_a_step(network: Ours) -> None:
    calls, _ = host_profile.kernel_calls(network, 1)
    result = host_profile.product_rows(calls, 1, 1)
    rows = result["products"]
    assert result["multiply_adds"] == sum(row["calls"] * row["count"] * row["m"] * row["k"] * row["n"] for row in rows)
    # Forward, dx and dw; the first layer, 3×3 filters of 3 channels for 64 at 2 pictures of 8×8, has no dx. The mean of
    # 128 channels over 2×2 pixels is a product too, and so is its gradient.
    forward = summary(network.model, (3, 8, 8)).multiply_adds * 2
    assert result["multiply_adds"] == 3 * forward - 2 * 64 * 27 * 64 + 2 * (2 * 4 * 128)
    # The 1×1 units of 3a, 16 + 32 + 16 filters on the 64 channels of the first layer.
    backward = [
        row for row in rows if (row["m"], row["k"], row["n"]) == (128, 64, 64) and "backward" in row["function"]
    ]
    assert [row["count"] for row in backward] == [2]
    assert all(row["gflops"] > 0 and row["gflops_alone"] > 0 for row in rows)


def test_plain_functions_are_back_after_a_profile(network: Ours) -> None:
    before = {name: getattr(kernels(np.empty(0)), name) for name in kernels(np.empty(0)).__all__}
    host_profile.kernel_calls(network, 1)
    assert before == {name: getattr(kernels(np.empty(0)), name) for name in kernels(np.empty(0)).__all__}


def kernel_calls(network: Ours) -> tuple[list[host_profile.Call], int, float]:
    calls, total_ms = host_profile.kernel_calls(network, 1)
    return calls, 1, total_ms


def test_any_module_of_kernels_is_profiled(network: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without __all__, which the pools alone use."""
    module = types.ModuleType("textbook")
    vars(module).update(
        {name: getattr(kernels(np.empty(0)), name) for name in kernels(np.empty(0)).__all__},
        _private=print,
        Window=Window,
    )
    monkeypatch.setattr(host_profile, "kernels", lambda array: module)
    assert set(host_profile.table_functions(module)) == set(kernels(np.empty(0)).__all__)
    monkeypatch.setattr("minigrad.ops.pool.kernels", lambda array: module)
    calls, _ = host_profile.kernel_calls(network, 1)
    # The matmul is the mean at the end of the network.
    assert {call.name for call in calls} == {"max_pool_winners", "max_pool_dx", "matmul", "update"}


def test_rates_of_kernels() -> None:
    """2 ms for 1,000 values are 2,000 ns a value; 10 products of 2·3·5 in 3 ms are 600 / 0.003 operations a second."""
    product = host_profile.Product(2, 3, 5)
    calls = [host_profile.Call("add", 1.0, 500, None, 0), host_profile.Call("add", 1.0, 500, None, 0)]
    rows = host_profile.kernel_rows([*calls, host_profile.Call("conv2d", 3.0, 9, product, 10)], 1, 6.0)
    assert [(row["name"], row["calls"], row["ms"], row["share"]) for row in rows] == [
        ("conv2d", 1, 3.0, 0.5),
        ("add", 2, 2.0, pytest.approx(1 / 3)),
        ("outside kernels", 0, 1.0, pytest.approx(1 / 6)),
    ]
    assert rows[0]["gflops"] == pytest.approx(600 / 0.003 / 1e9)
    assert rows[1]["ns"] == 2000
    assert "ns" not in rows[0]


def test_sizes_of_products() -> None:
    """By the formulas: m pixels of the output, k cells of a filter, n filters."""
    window = Window.of((8, 8), 3, 2, 1)
    x, weight, y = np.zeros((2, 5, 8, 8)), np.zeros((7, 5, 3, 3)), np.zeros((2, 7, 4, 4))
    wanted = host_profile.Product(32, 45, 7)
    of = host_profile.product_of
    assert of("conv2d", {"x": x, "weight": weight, "window": window}, y) == (wanted, 1)
    assert of("conv2d_statistics", {"x": x, "weight": weight, "window": window}, (y, 0, 0)) == (wanted, 1)
    assert of("conv2d_dw", {"dy": y, "x": x, "window": window}, (weight, None)) == (wanted, 1)
    given = {"dy": y, "x": x, "weight": weight, "window": window, "needs_dx": False, "needs_dw": True}
    assert of("conv2d_backward", given, ()) == (wanted, 1)
    given = {"dzs": [y], "y": y, "x": x, "weight": weight, "window": window, "needs_dx": True}
    assert of("conv_bn_relu_backward", given, ()) == (wanted, 2)
    assert of("matmul", {"a": np.zeros((1, 5)), "b": np.zeros((7, 5, 2))}, ()) == (host_profile.Product(1, 5, 2), 7)
    assert of("add", {"a": x, "b": x}, x) == (None, 0)


def test_kept_bytes_are_those_of_the_activations(network: Ours) -> None:
    one = network.kept_bytes()
    larger = Ours(TINY._replace(batch=6))
    assert 2 < larger.kept_bytes() / one < 3.5  # three times the pictures, the same filters


@pytest.mark.parametrize("work", [*WORKLOADS.values(), Workload("googlenet_bn", 64, 1000, 2)])
def test_peers_have_the_same_parameters(work: Workload) -> None:
    pytest.importorskip("torch")
    from benchmarks.torch_peers import build

    model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
    theirs = build(HOST["torch"], work._replace(batch=1)).model  # type: ignore[attr-defined]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.size for p in model.parameters())


# ---- Beside others ----


def test_another_checkout_takes_turns(run: Run, tmp_path: Path) -> None:
    """The other checkout is this one with a larger learning rate: its loss and gradients are the same, not its
    parameters. Its time is not ours."""
    root = Path(__file__).parents[1]
    for package in ("minigrad", "inception"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    schedule = tmp_path / "minigrad/optim.py"
    schedule.write_text(
        schedule.read_text() + "\n_init = SGD.__init__\n"
        "SGD.__init__ = lambda self, parameters, lr, **more: _init(self, parameters, 2 * lr, **more)\n"
    )
    code, out, err = run(
        *("--quick", "--workload", "small", "--threads", 1, "--against", tmp_path, "--measures", "step")
    )
    assert (code, err) == (0, "")
    assert "minigrad, --against" in out
    assert "to --against" in out
    line = next(line for line in out.splitlines() if "first step:" in line)
    assert line.startswith(
        "small, batch 2, 1 thread, first step: loss bit-identical, gradient bit-identical, parameter equal"
    )


def test_kernels_that_this_minigrad_cannot_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(minigrad, "set_kernels", chosen.append, raising=False)
    ours.use_kernels("textbook")
    ours.use_kernels("")
    assert chosen == ["textbook"]
    monkeypatch.delattr(minigrad, "set_kernels")
    with pytest.raises(SystemExit, match="has no set_kernels, so the textbook kernels cannot be chosen"):
        ours.use_kernels("textbook")


def test_how_far_a_first_step_is_from_another(tmp_path: Path) -> None:
    one = {"loss": np.float32(2), "gradient 0": np.float32([1, 4]), "gradient 1": np.float32([0, -0.0])}
    other = {"loss": np.float32(2), "gradient 0": np.float32([1.25, 4]), "gradient 1": np.float32([0, 0])}
    np.savez(tmp_path / "one.npz", **one)
    np.savez(tmp_path / "other.npz", **other)
    found = compare.difference(str(tmp_path / "one.npz"), str(tmp_path / "other.npz"))
    assert found == {"loss": 0.0, "gradient": 0.0625}
    words = tables.bits(found, "ours_textbook")
    assert words == "loss bit-identical, gradient equal to 4.0 bits (6.2e-02) with minigrad, textbook"


@pytest.mark.parametrize("who", ["onnxruntime", "openvino"])
def test_an_engine_computes_the_same_network(who: str, tmp_path: Path) -> None:
    for package in compare.NEEDS[who]:
        pytest.importorskip(package)
    path = compare.export(TINY, [who], tmp_path)
    engine: Any = engines.build(who, path, TINY)
    engine.set_threads(1)
    pictures = engine.feed["pictures"] if who == "onnxruntime" else engine.pictures
    with no_grad():
        wanted = create_model(TINY.model, num_classes=TINY.classes).eval()(Tensor(pictures))
    np.testing.assert_allclose(engine.evaluate(), wanted.data, rtol=1e-4, atol=1e-5)


def test_what_is_absent_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None if name == "openvino" else name)
    assert compare.installed() == ["ours", "torch", "torch_channels_last", "torch_compile", "onnxruntime"]
    assert capsys.readouterr().out == "left out, since openvino cannot be imported: pip install openvino\n"


def rows_of(seconds: dict[str, float], threads: int) -> list[Record]:
    found = {("evaluate", who): [{"seconds": s, "mb": s, "start_mb": 0.0}] for who, s in seconds.items()}
    return [row | {"threads": threads} for row in tables.medians("small", TINY, found)]


def test_ratios_to_the_best_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"ours": 4.0, "torch": 8.0, "torch_channels_last": 5.0, "torch_compile": 2.5, "onnxruntime": 2.0}
    rows = rows_of(one, 1) + rows_of({"ours": 2.0, "torch": 1.0, "ours_before": 2.5}, 2)
    tables.print_ratios(rows)
    *_, first, second = capsys.readouterr().out.strip().splitlines()
    assert re.split(r"  +", first) == [
        *("small", "evaluation", "2", "1", "4000.0", "PyTorch, channels_last", "0.80", "0.80", "onnxruntime", "2.00")
    ]
    assert re.split(r"  +", second) == [
        *("small", "evaluation", "2", "2", "2000.0", "2.00", "PyTorch, NCHW", "2.00", "2.00", "0.800", "0.800")
    ]


def test_processors_side_by_side(tmp_path: Path) -> None:
    for cpu, ratio in (("AMD EPYC", 2.0), ("Intel(R) Xeon(R) Processor", 4.0)):
        where = machine() | {"cpu": cpu, "cores": 2, "date": "2026-11-28", "versions": {"python": "3.12.1"}}
        kept = results.Results(tmp_path, {"machine": where, "quick": False, "threads": 1})
        kept.keep("compare", rows_of({"ours": 1.0, "torch": ratio}, 1), 0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amd-epyc", "intel-xeon-processor"]
    assert results.side_by_side(tmp_path).splitlines() == [
        "| workload | batch | threads |  | AMD EPYC, 2 cores, Python 3.12.1, 2026-11-28 | Intel(R) Xeon(R) Processor, "
        "2 cores, Python 3.12.1, 2026-11-28 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `small` | 2 | 1 | evaluation | 1,000 ms (0.50, –) | 1,000 ms (0.25, –) |",
    ]


def test_the_page_shows_the_figures_on_disk() -> None:
    page = (Path(__file__).parents[1] / "benchmarks/README.md").read_text(encoding="utf-8")
    assert results.side_by_side(results.HERE) in page


def test_imports_of_the_benchmarks_have_no_circle() -> None:
    """Imports inside functions count; a module by name, which would hide a circle, is not imported at all."""
    edges: dict[str, set[str]] = {}
    for path in Path(command.__file__).parent.glob("*.py"):
        edges[path.stem] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr == "import_module"), path
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
                edges[path.stem] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                edges[path.stem].add((node.module or "").split(".")[1])
    assert edges["child"] >= {"ours", "vocabulary", "clock"}
    assert len([*graphlib.TopologicalSorter(edges).static_order()]) == len(edges)  # raises CycleError
