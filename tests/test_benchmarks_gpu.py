"""What the benchmarks do on a GPU: everything but the figures, on the stand-in."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_on_cpu
import fake_cupy
import pytest
from tiny_benchmark import TINY, Run

import benchmarks.__main__ as command
from benchmarks import gpu_parts, plots, processes, tables
from benchmarks.clock import steady_times
from benchmarks.machine import folder_name, machine
from benchmarks.vocabulary import CONTENDERS, GPU, MEASURES, Failed, Job, Network, Record


@pytest.fixture
def on_stand_in(xp: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that are started find the stand-in as `cupy` too."""
    if xp is fake_cupy:
        if cuda_on_cpu.compiler() is None:
            pytest.skip("no C++ compiler, which runs CUDA kernels on the CPU")
        (tmp_path / "import").mkdir()
        stand_in = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import fake_cupy\n"
        (tmp_path / "import/cupy.py").write_text(stand_in + "sys.modules['cupy'] = fake_cupy\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "import"))


on_gpu = pytest.mark.parametrize("xp", ["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
QUICK = ["--backend", "cupy", "--quick", "--workload", "small"]


@pytest.mark.parametrize("arguments", [[], ["--report", "DIR"]])
def test_without_cupy_there_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    folder = tmp_path / "new"
    code, out, err = run("--backend", "cupy", *(str(folder) if word == "DIR" else word for word in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("benchmarks: error: the backend 'cupy' cannot be used here: CuPy is not installed")
    assert err.count("\n") == 1
    assert not folder.exists()


@on_gpu
def test_a_gpu_that_is_not_there_is_one_sentence(run: Run, xp: Any) -> None:
    code, out, err = run("--backend", "cupy", "--device", 99)
    assert (code, out) == (1, "")
    assert "there is no GPU 99 on this machine" in err
    assert err.count("\n") == 1


@on_gpu
def test_report_of_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xp: Any, on_stand_in: None) -> None:
    """All parts. What the report of this GPU had stays."""
    earlier = {"compare": {"machine": machine(), "quick": False, "found": []}}
    name = folder_name({"gpu": gpu_parts.name_of(0)})
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(gpu_parts, "torch_here", lambda: {"why": "PyTorch is not installed"})
    code, out, err = run(*QUICK, "--precision", "tf32", "--report", tmp_path)
    assert (code, err) == (0, "")
    assert "nothing to compare with: PyTorch is not installed" in out
    parts = json.loads((tmp_path / name / "results.json").read_text())
    assert parts.pop("compare") == earlier["compare"]
    assert [*parts] == [f"{part}_gpu" for part in gpu_parts.PARTS]
    assert all(part["machine"]["gpu"] and part["machine"]["versions"]["cupy"] for part in parts.values())
    found = {name.removesuffix("_gpu"): part["found"] for name, part in parts.items()}

    assert found["environment"]["cupy_status"][0] == "ok"
    assert {"gpu", "driver_cuda", "runtime_cuda", "cupy", "torch", "nvidia_smi"} <= set(found["environment"])

    assert {(r["n"], r["precision"]) for r in found["ceilings"]["products"]} == {(64, "float32"), (64, "tf32")}
    assert all(us > 0 for us in found["ceilings"]["host_us"].values())

    mine = {row["who"] for row in found["compare"]}
    assert {"ours_tf32"} <= mine <= {"ours_tf32", "ours_tf32_graph"}
    assert {row["measure"] for row in found["compare"]} == set(MEASURES)
    assert all(row["host_seconds"] > 0 and row["mb"] > 0 for row in found["compare"])
    assert all(row["images_per_second"] == pytest.approx(2 / row["seconds"]) for row in found["compare"])

    profile = found["profile"]["small"]
    assert profile["who"] == "ours_tf32"
    assert profile["launches_per_step"] == sum(row["calls"] for row in profile["launches"]) > 100
    assert sum(kernel["share"] for kernel in profile["kernels"]) == pytest.approx(1)
    # The products are those that NumPy's profile tells of: no more, as filters of 3×3 are not transformed here.
    assert profile["multiply_adds"] == pytest.approx(3 * profile["forward_multiply_adds"], rel=0.1)


@on_gpu
def test_a_part_that_fails_does_not_lose_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xp: Any
) -> None:
    """One raises, and of one the process ends badly: both are told, and the report is written."""
    monkeypatch.setattr(gpu_parts, "torch_here", lambda: {"why": "PyTorch is not installed"})
    monkeypatch.setattr(gpu_parts, "environment", lambda *_: 1 / 0)
    monkeypatch.setattr(command, "WORKLOADS", {"small": TINY._replace(classes=-1)})
    code, out, _ = run(*QUICK, "--report", tmp_path)
    assert code == 0
    assert "environment failed: ZeroDivisionError (division by zero)" in out
    assert "left out: minigrad, float32, googlenet_small: " in out
    (path,) = tmp_path.glob("*/results.json")
    parts = json.loads(path.read_text())
    assert parts["environment_gpu"]["found"] == {"failed": "ZeroDivisionError (division by zero)"}
    assert parts["compare_gpu"]["found"] == []


def test_the_parts_on_a_gpu_take_ten_minutes_at_most() -> None:
    assert sum(gpu_parts.SECONDS.values()) <= 600


def test_after_a_job_that_fails_the_others_are_done() -> None:
    """Three networks in one process: the second ends it, and the third gets a fresh one."""
    jobs = [Job("ours", [TINY._replace(classes=n)], [1], ["forward"], 1) for n in (10, -1, 7)]
    (_, first), (job, second), (_, third) = processes.start_each(jobs)
    assert isinstance(first, list)
    assert first[0]["classes"] == 10
    assert job is jobs[1]
    assert isinstance(second, Failed)
    assert str(second).startswith("minigrad, googlenet_small: ")
    assert isinstance(third, list)
    assert third[0]["classes"] == 7


def test_what_takes_too_long_has_failed() -> None:
    (_, found), (_, other) = processes.start_each([Job("ours", [TINY], [1], ["forward"], 1)] * 2, seconds=0.05)
    assert "not done within 0.05 seconds" in str(found)
    assert isinstance(other, Failed)


def test_names_and_what_they_stand_for() -> None:
    def meaning(who: str) -> tuple[str, bool, str, bool]:
        contender = CONTENDERS[who]
        return contender.kind, contender.channels_last, contender.precision, contender.graph

    assert meaning("torch_channels_last") == ("torch", True, "float32", False)
    assert meaning("torch_channels_last_bf16_graph") == ("torch", True, "bf16", True)
    assert meaning("ours_tf32") == ("ours", False, "tf32", False)
    assert GPU["torch_tf32_graph"].title == "PyTorch, NCHW, tf32, graph"
    assert len(GPU) == 2 * 2 + 2 * 3 * 2


def test_ratios_on_a_gpu_are_to_ours_of_the_same_precision() -> None:
    seconds = {"ours_float32": 4.0, "ours_tf32": 2.0, "ours_tf32_graph": 1.0, "torch_float32": 8.0, "torch_tf32": 1.0}
    seconds |= {
        "torch_channels_last_tf32": 0.5,
        "torch_tf32_graph": 0.25,
        "torch_float32_graph": 2.0,
        "torch_bf16": 1.0,
    }
    found = {("step", who): [{"seconds": s, "host_seconds": s, "mb": s, "start_mb": 0.0}] for who, s in seconds.items()}
    rows = {row["who"]: row for row in tables.medians("small", TINY, found)}
    wanted = {"torch_float32": 0.5, "torch_tf32": 2.0, "torch_channels_last_tf32": 4.0, "torch_tf32_graph": 4.0}
    wanted["torch_float32_graph"] = 2.0  # ours is not recorded in float32 here: the step as ever
    assert {who: rows[who]["ratio_seconds"] for who in wanted} == wanted
    assert "ratio_seconds" not in rows["torch_bf16"]
    assert {who for who, row in rows.items() if row["best_eager"]} == {
        "torch_float32", "torch_channels_last_tf32", "torch_bf16"
    }  # fmt: skip


def test_comparison_on_a_gpu_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: list[Record] = [
        {"workload": "small", "batch": 2, "measure": measure, "who": who, "ratio_seconds": 0.5, "ratio_mb": 1.5}
        for measure in MEASURES
        for who in GPU
    ]
    found = {"found": rows, "machine": machine() | {"gpu": "a GPU"}, "quick": True}
    failed = found | {"found": {"failed": "ZeroDivisionError"}}
    written = plots.draw({"compare_gpu": found, "profile_gpu": failed}, tmp_path)
    assert [path.name for path in written] == ["compare_gpu.png"]


def test_steady_times_wait_at_the_end_of_many_calls() -> None:
    told: list[str] = []
    network = Network()
    network.wait = lambda: told.append("wait")
    network.trim = lambda: told.append("trim")
    seconds, host = steady_times(lambda: told.append("call"), network, 3)
    assert host > 0
    assert seconds > 0
    said = " ".join(told)
    assert said.startswith("call wait " * 5 + "trim call wait " + "call " * 1000 + "wait ")
    assert said.endswith("call wait " * 5 + "call wait")


def test_a_trace_is_summed_by_kernel() -> None:
    pytest.importorskip("torch")
    from benchmarks.trace import of_events, traced

    events = [
        {"cat": "kernel", "name": "gemm", "dur": 30.0},
        {"cat": "kernel", "name": "gemm", "dur": 50.0},
        {"cat": "kernel", "name": "relu", "dur": 10.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 10.0},
        {"cat": "cpu_op", "name": "aten::mm", "dur": 99.0},
        {"name": "process_name", "ph": "M"},
    ]
    assert of_events(events, 2) == {
        "kernels": [
            {"name": "gemm", "launches": 1.0, "ms": 0.04},
            {"name": "relu", "launches": 0.5, "ms": 0.005},
        ],
        "launches": 1.5,
        "copies": 0.5,
        "busy_ms": pytest.approx(0.05),
    }
    calls: list[int] = []
    assert traced(lambda: calls.append(1), lambda: None, 2)["launches"] == 0  # the profiler's file is read
    assert len(calls) == 3 + 2


@pytest.mark.parametrize("who", [who for who in GPU if not GPU[who].ours and not GPU[who].graph])
def test_peers_compute_in_the_precision_of_their_name(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """On the CPU, which has no TF32 but the switches."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peers

    asked = []
    monkeypatch.setattr(torch_peers, "gpu", lambda device, precision: asked.append(precision) or torch.device("cpu"))
    network: Any = torch_peers.build(GPU[who], TINY, 0)
    seen = []
    last = network.model.layers[-1]
    last.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    loss = network.loss()
    network.evaluate()
    wanted = torch.bfloat16 if "bf16" in who else torch.float32
    assert seen == [wanted, wanted]
    assert loss.dtype == torch.float32
    assert asked == [GPU[who].precision]
    is_last = network.model.layers[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last == ("channels_last" in who)


def test_pytorch_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has a GPU")
    (result,) = processes.start_each([Job("torch_tf32_graph", [TINY], [1], ["step"], 1, True, 0)])
    assert str(result[1]) == (
        f"PyTorch, NCHW, tf32, graph, googlenet_small: this PyTorch, {torch.__version__}, has no GPU: install one that "
        "is built for CUDA"
    )
    assert gpu_parts.torch_here()["why"] == f"PyTorch {torch.__version__} is installed but finds no GPU"


def test_calls_are_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With names of torch.cuda stood in for, in the order that PyTorch's manual gives."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peers

    told: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            told.append("wait")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextlib.contextmanager
    def within(what: Any) -> Iterator[None]:
        told.append(f"in {type(what).__name__}")
        yield
        told.append("out")

    stand_ins = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "stream": within, "graph": within}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch_peers, "gpu", lambda device, precision: torch.device("cpu"))
    network: Any = torch_peers.build(GPU["torch_float32_graph"], TINY, 0)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: told.append("step"))
    network.step()
    network.step()
    assert told == [
        *("wait", "in Stream", "step", "step", "step", "out", "wait"),
        *("in Graph", "step", "out", "replay", "replay"),
    ]
    network.forward()
    assert told[-3:] == ["in Graph", "out", "replay"]
