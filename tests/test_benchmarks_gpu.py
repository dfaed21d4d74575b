"""What the benchmarks do on a GPU: everything but the figures, on the stand-in."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_on_cpu
import fake_cupy
import pytest
from tiny_benchmark import TINY, Run

import benchmarks.__main__ as command
from benchmarks import gpu_parts, gpu_tests, measure, plots, tables
from benchmarks.measure import GPU_PEERS, MEASURES, Form, Job, Network, steady_times

Pretend = Callable[[str], None]
RUNS_IT = """
import subprocess, sys
print("compute-sanitizer: COMPUTE-SANITIZER", flush=True)
code = subprocess.run(sys.argv[sys.argv.index(sys.executable):]).returncode
print("compute-sanitizer: ERROR SUMMARY: 0 errors")
sys.exit(code)
"""


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


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretend:
    """Put a compute-sanitizer on PATH that runs these lines of Python."""

    def write(code: str) -> None:
        path = tmp_path / "bin/compute-sanitizer"
        path.parent.mkdir()
        path.write_text(f"#!{sys.executable}\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)

    return write


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
def test_report_of_a_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xp: Any, on_stand_in: None, pretend: Pretend
) -> None:
    """All parts; the tests are two of this file that need no GPU. What the CPU's report had stays."""
    pretend(RUNS_IT)
    monkeypatch.setattr(gpu_tests, "TOOLS", {"memcheck": gpu_tests.TOOLS["memcheck"]})
    monkeypatch.setattr(
        gpu_tests, "CHECKED", ["-m", "gpu", "tests/test_kernels_cuda.py", "-k", "augment and float32 and not textbook"]
    )
    earlier = {"compare": {"machine": measure.machine(), "quick": False, "found": []}}
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(gpu_parts, "torch_here", lambda: {"why": "PyTorch is not installed"})
    monkeypatch.setattr(
        gpu_tests, "TESTS", ["-m", "not gpu", "tests/test_benchmarks.py", "-k", "sizes_of or replayed_operands"]
    )
    code, out, err = run(*QUICK, "--precision", "tf32", "--report", tmp_path)
    assert (code, err) == (0, "")
    assert "nothing to compare with: PyTorch is not installed" in out
    parts = json.loads((tmp_path / "results.json").read_text())
    assert parts.pop("compare") == earlier["compare"]
    assert [*parts] == [f"{part}_gpu" for part in gpu_parts.GPU_PARTS]
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

    assert found["tests"] == {
        "exit_code": 0,
        "summary": found["tests"]["summary"],
        "output": "tests.txt",
        "counts": found["tests"]["counts"] | {"passed": 2},
        "failures": [],
    }
    assert found["tests"]["summary"] in (tmp_path / "tests.txt").read_text()

    checked = found["memory_check"]["memcheck"]
    assert (checked["clean"], checked["exit_code"], checked["errors"], checked["why"]) == (True, 0, 0, None)
    assert checked["counts"]["passed"] == 6
    never = {"average", "adamw", "rmsprop", "squares", "clip", "lrn", "lrn_dx"}  # neither in a step nor in those tests
    assert never < set(checked["not_launched"])
    assert not {"augment", "im2col", "sgd"} & set(checked["not_launched"])
    assert "6 passed" in (tmp_path / "memcheck.txt").read_text()
    assert (tmp_path / "report.txt").read_text() == out


@on_gpu
def test_a_part_that_fails_does_not_lose_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xp: Any
) -> None:
    """One raises, of one the process ends badly, and tests fail: all are told, and the report is written."""
    monkeypatch.setattr(gpu_parts, "torch_here", lambda: {"why": "PyTorch is not installed"})
    monkeypatch.setattr(gpu_parts, "environment", lambda *_: 1 / 0)
    monkeypatch.setattr(command, "WORKLOADS", {"small": TINY._replace(classes=-1)})
    monkeypatch.setattr(gpu_tests, "TESTS", ["tests/no_such_file.py"])
    monkeypatch.setattr(gpu_tests, "compute_sanitizer", lambda: None)
    code, out, _ = run(*QUICK, "--report", tmp_path)
    assert code == 0
    assert "environment failed: ZeroDivisionError (division by zero)" in out
    assert "left out: minigrad, float32, googlenet_small: " in out
    parts = json.loads((tmp_path / "results.json").read_text())
    assert parts["environment_gpu"]["found"] == {"failed": "ZeroDivisionError (division by zero)"}
    assert parts["tests_gpu"]["found"]["exit_code"] not in (0, None)
    assert parts["tests_gpu"]["found"]["failures"] == [] == parts["compare_gpu"]["found"]
    (why,) = parts["memory_check_gpu"]["found"].values()
    assert why in out.splitlines()
    assert why.startswith("skipped, as compute-sanitizer is neither on PATH nor in ")
    assert "pip install nvidia-cuda-sanitizer-api" in why


ONE_PASSED = "..                 [100%]\n2 passed, 9 deselected in 1.20s\nkernels that were not launched: \n"
WRITES_OUTSIDE = """
compute-sanitizer: COMPUTE-SANITIZER
..compute-sanitizer: Invalid __global__ write of size 4 bytes
compute-sanitizer:     at augment+0x50
compute-sanitizer:     Address 0x710fdca00001 is out of bounds
compute-sanitizer:
compute-sanitizer: Invalid __global__ read of size 4 bytes
compute-sanitizer:
FAILED tests/test_kernels_cuda.py::test_augment
1 failed, 1 passed, 9 deselected in 1.20s
kernels that were not launched: lrn, lrn_dx
compute-sanitizer: ERROR SUMMARY: 1,002 errors
compute-sanitizer: ERROR SUMMARY: 982 errors were not printed. Use --print-limit option to adjust the number
"""
RACES = """
compute-sanitizer: COMPUTE-SANITIZER
compute-sanitizer: Error: Race reported between Write access at clip+0x90
compute-sanitizer:     and Read access at clip+0x100 [508 hazards]
compute-sanitizer:
compute-sanitizer: RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN, NO_RACES = "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
NO_GPU = "Error: Target application terminated before first instrumented API call"


@pytest.mark.parametrize(
    ("said", "code", "wanted"),
    [
        (f"{ONE_PASSED}compute-sanitizer: {CLEAN}", 0, {"clean": True, "errors": 0, "not_launched": [], "why": None}),
        (f"{ONE_PASSED}compute-sanitizer: {NO_RACES}", 0, {"clean": True, "errors": 0, "first_error": []}),
        (WRITES_OUTSIDE, 99, {
            "clean": False, "errors": 1002, "counts": {"failed": 1, "passed": 1, "deselected": 9}, "why": None,
            "not_launched": ["lrn", "lrn_dx"],
            "first_error": [
                "Invalid __global__ write of size 4 bytes", "    at augment+0x50",
                "    Address 0x710fdca00001 is out of bounds",
            ],
        }),
        (RACES + ONE_PASSED, 99, {"clean": False, "errors": 1, "why": None, "first_error": [
            "Error: Race reported between Write access at clip+0x90", "    and Read access at clip+0x100 [508 hazards]",
        ]}),
        (WRITES_OUTSIDE.split("FAILED")[0], -11, {"clean": False, "errors": None, "first_error": [
            "Invalid __global__ write of size 4 bytes", "    at augment+0x50",
            "    Address 0x710fdca00001 is out of bounds",
        ]}),
        # It ends well but has seen nothing, or tests that fail: no error, and yet not clean.
        (f"compute-sanitizer: {CLEAN}", 0, {"clean": False, "why": "no test has passed under it"}),
        (f"3 skipped in 1.20s\ncompute-sanitizer: {CLEAN}", 0, {"clean": False, "counts": {"skipped": 3}}),
        (f"1 failed, 3 passed in 1.20s\ncompute-sanitizer: Target application returned an error\n"
         f"compute-sanitizer: {CLEAN}", 1,
         {"clean": False, "errors": 0, "why": "exit code 1: Target application returned an error"}),
        (f"compute-sanitizer: COMPUTE-SANITIZER\ncompute-sanitizer: {NO_GPU}", 255,
         {"clean": False, "errors": None, "counts": {}, "not_launched": None, "why": f"exit code 255: {NO_GPU}"}),
        ("", -9, {"clean": False, "why": "exit code -9: it said nothing"}),
        ("the loader\ncannot open shared object file", 127, {"why": "exit code 127: cannot open shared object file"}),
    ],
)  # fmt: skip
def test_what_the_memory_checker_says_is_understood(said: str, code: int, wanted: dict[str, Any]) -> None:
    found = gpu_tests.verdict(code, said.splitlines())
    assert {key: found[key] for key in wanted} == wanted


def test_the_memory_checkers_tools_take_turns(
    pretend: Pretend, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each is told which tool it is, and what to watch; the first finds something, the last crashes."""
    texts = {"memcheck": (WRITES_OUTSIDE, 99), "racecheck": (ONE_PASSED + "compute-sanitizer: " + NO_RACES, 0)}
    pretend(
        f"import os, sys\ntexts = {texts}\ntool = sys.argv[sys.argv.index('--tool') + 1]\n"
        "print(sys.argv[1:], os.environ['MINIGRAD_DEVICE'])\n"
        "if tool == 'initcheck': os.abort()\n"
        "print(texts[tool][0]), sys.exit(texts[tool][1])"
    )
    found = gpu_tests.check_memory(argparse.Namespace(report=tmp_path, device=1), 100)
    assert found.pop("program") == str(tmp_path / "bin/compute-sanitizer")
    assert {tool: (record["clean"], record["errors"]) for tool, record in found.items()} == {
        "memcheck": (False, 1002), "racecheck": (True, 0), "initcheck": (False, None)
    }  # fmt: skip
    assert found["initcheck"]["exit_code"] == -6
    said = (tmp_path / found["memcheck"]["output"]).read_text()
    assert "'--padding'" in said
    assert "'--padding'" not in (tmp_path / "racecheck.txt").read_text()
    assert "'benchmarks.gpu_tests', '1', '" in said
    assert said.splitlines()[0].endswith("test_odd_sizes'] 1")
    out = capsys.readouterr().out
    assert "memcheck: 1002 errors; tests: 1 failed, 1 passed\n" in out
    assert "not launched: lrn, lrn_dx\n    Invalid __global__ write of size 4 bytes\n    " in out
    assert "racecheck: 0 errors; tests: 2 passed\n" in out
    assert "initcheck: it counted no errors; tests: none; exit code -6: " in out


def test_a_memory_checker_that_hangs_is_stopped_with_what_it_started(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_tests, "TOOL_SECONDS", 2)
    monkeypatch.setattr(gpu_tests, "SPARE_SECONDS", 0.9)
    child, number = "import time; time.sleep(600)", tmp_path / "number"
    pretend(
        f"import subprocess, sys, pathlib\nprocess = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(number)!r}).write_text(str(process.pid))\nprocess.wait()"
    )
    started = time.perf_counter()
    found = gpu_tests.check_memory(argparse.Namespace(report=tmp_path, device=0), 3)
    assert time.perf_counter() - started < 30
    assert found["memcheck"]["why"] == "stopped, as it was not done in time"
    assert not found["memcheck"]["clean"]
    assert found["racecheck"] == found["initcheck"] == {"clean": False, "why": "not run, as there was no time left"}
    for _ in range(100):  # until it is gone, or a zombie that nobody has waited for
        path = Path(f"/proc/{number.read_text()}/stat")
        if not path.exists() or path.read_text().rpartition(")")[2].split()[0] in "ZX":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the checker started is still running")


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "CUDA_PATH", "wheel"])
def test_the_memory_checker_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    here = shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution(gpu_tests.WHEEL)
        pytest.skip("NVIDIA's wheel is installed")
    assert gpu_tests.compute_sanitizer() == here
    folder = tmp_path / "bin"
    if place == "wheel":
        folder, info = tmp_path / "nvidia/cu13/bin", tmp_path / "nvidia_cuda_sanitizer_api-13.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-sanitizer-api\nVersion: 13.0\n")
        (info / "RECORD").write_text("nvidia/cu13/bin/compute-sanitizer,,\nnvidia/cu13/docs/index.html,,\n")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setenv(place, str(folder if place == "PATH" else tmp_path))
    folder.mkdir(parents=True)
    path = folder / "compute-sanitizer"
    path.write_text("")
    assert gpu_tests.compute_sanitizer() == here  # a file that is no program
    path.chmod(0o755)
    assert gpu_tests.compute_sanitizer() == (here if place == "wheel" and here else str(path))


@pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
def test_what_is_checked_has_no_memory_pool(monkeypatch: pytest.MonkeyPatch, xp: Any) -> None:
    """It is off before the first array of ours, and stays so."""
    told: list[Any] = []
    monkeypatch.setattr(fake_cupy.cuda, "set_allocator", told.append)
    monkeypatch.setattr(gpu_tests.OnGpu, "step", lambda network: told.append(network.x.shape))
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: told.append(arguments) or 5)
    assert gpu_tests.watched(0, time.time(), ["some", "tests"]) == 5
    assert told == [None, (4, 3, 32, 32), ["-p", "no:cacheprovider", "some", "tests"]]


@pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
@pytest.mark.parametrize("in_time", [True, False])
def test_what_is_checked_launches_every_kernel(xp: Any, on_stand_in: None, in_time: bool) -> None:
    """Without the last of the tests, which are more sizes, and those in float64; too late, none begins."""
    assert gpu_tests.CHECKED[-1].endswith("test_odd_sizes")
    few = [*gpu_tests.CHECKED[:-1], "-k", "not float64"]
    command_line = [sys.executable, "-m", "benchmarks.gpu_tests", "0", str(time.time() + 600 * in_time), *few]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=gpu_tests.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    counts, never = done.stdout.splitlines()[-2:]
    if in_time:
        assert never == gpu_tests.NEVER
        assert gpu_tests.counts_in(counts)["passed"] > 100
    else:
        assert (
            {"augment", "average"} < set(never.removeprefix(gpu_tests.NEVER).split(", ")) < gpu_tests.kernels_of_ours()
        )
        assert {"skipped", "deselected"} == set(gpu_tests.counts_in(counts))


def test_the_parts_on_a_gpu_take_ten_minutes_at_most() -> None:
    assert sum(gpu_parts.GPU_SECONDS.values()) <= 600
    assert 2 * gpu_tests.SPARE_SECONDS < gpu_tests.TOOL_SECONDS <= gpu_parts.GPU_SECONDS["memory_check"]


def test_after_a_job_that_fails_the_others_are_done() -> None:
    """Three networks in one process: the second ends it, and the third gets a fresh one."""
    jobs = [Job("ours", [TINY._replace(classes=n)], [1], ["forward"], 1) for n in (10, -1, 7)]
    (_, first), (job, second), (_, third) = measure.start_each(jobs)
    assert isinstance(first, list)
    assert first[0]["classes"] == 10
    assert job is jobs[1]
    assert isinstance(second, measure.Failed)
    assert str(second).startswith("minigrad, googlenet_small: ")
    assert isinstance(third, list)
    assert third[0]["classes"] == 7


def test_what_takes_too_long_has_failed() -> None:
    (_, found), (_, other) = measure.start_each([Job("ours", [TINY], [1], ["forward"], 1)] * 2, seconds=0.05)
    assert "not done within 0.05 seconds" in str(found)
    assert isinstance(other, measure.Failed)


def test_names_and_what_they_stand_for() -> None:
    assert Form.of("torch_channels_last") == Form("torch_channels_last", "float32", False)
    assert Form.of("torch_channels_last_bf16_graph") == Form("torch_channels_last", "bf16", True)
    assert Form.of("ours_tf32") == Form("ours", "tf32", False)
    assert GPU_PEERS["torch_tf32_graph"] == "PyTorch, NCHW, tf32, graph"
    assert len(GPU_PEERS) == 2 * 2 + 2 * 3 * 2


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
    rows: list[measure.Record] = [
        {"workload": "small", "measure": measure, "who": who, "ratio_seconds": 0.5, "ratio_mb": 1.5}
        for measure in MEASURES
        for who in GPU_PEERS
    ]
    found = {"found": rows, "machine": measure.machine() | {"gpu": "a GPU"}, "quick": True}
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


@pytest.mark.parametrize("who", [who for who in GPU_PEERS if not Form.of(who).ours and not Form.of(who).graph])
def test_peers_compute_in_the_precision_of_their_name(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """On the CPU, which has no TF32 but the switches."""
    torch = pytest.importorskip("torch")
    from benchmarks import peers

    asked = []
    monkeypatch.setattr(peers, "gpu", lambda device, precision: asked.append(precision) or torch.device("cpu"))
    network: Any = peers.build(who, TINY, 0)
    seen = []
    last = network.model.layers[-1]
    last.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    loss = network.loss()
    network.evaluate()
    wanted = torch.bfloat16 if "bf16" in who else torch.float32
    assert seen == [wanted, wanted]
    assert loss.dtype == torch.float32
    assert asked == [Form.of(who).precision]
    is_last = network.model.layers[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last == ("channels_last" in who)


def test_pytorch_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has a GPU")
    (result,) = measure.start_each([Job("torch_tf32_graph", [TINY], [1], ["step"], 1, True, 0)])
    assert str(result[1]) == (
        f"PyTorch, NCHW, tf32, graph, googlenet_small: this PyTorch, {torch.__version__}, has no GPU: install one that "
        "is built for CUDA"
    )
    assert gpu_parts.torch_here()["why"] == f"PyTorch {torch.__version__} is installed but finds no GPU"


def test_calls_are_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With names of torch.cuda stood in for, in the order that PyTorch's manual gives."""
    torch = pytest.importorskip("torch")
    from benchmarks import peers

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
    monkeypatch.setattr(peers, "gpu", lambda device, precision: torch.device("cpu"))
    network: Any = peers.build("torch_float32_graph", TINY, 0)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: told.append("step"))
    network.step()
    network.step()
    assert told == [
        *("wait", "in Stream", "step", "step", "step", "out", "wait"),
        *("in Graph", "step", "out", "replay", "replay"),
    ]
    network.forward()
    assert told[-3:] == ["in Graph", "out", "replay"]
