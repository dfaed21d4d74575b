"""tests/check_gpu.py: the tests on a GPU, and what NVIDIA's compute-sanitizer says of them; here on the stand-in."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_gpu
import cuda_on_cpu
import fake_cupy
import pytest

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
    found = check_gpu.verdict(code, said.splitlines())
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
    found = check_gpu.check_memory(argparse.Namespace(report=tmp_path, device=1), 100)
    assert found.pop("program") == str(tmp_path / "bin/compute-sanitizer")
    assert {tool: (record["clean"], record["errors"]) for tool, record in found.items()} == {
        "memcheck": (False, 1002), "racecheck": (True, 0), "initcheck": (False, None)
    }  # fmt: skip
    assert found["initcheck"]["exit_code"] == -6
    said = (tmp_path / found["memcheck"]["output"]).read_text()
    assert "'--padding'" in said
    assert "'--padding'" not in (tmp_path / "racecheck.txt").read_text()
    assert "check_gpu.py', 'watched', '1', '" in said
    assert said.splitlines()[0].endswith("test_odd_sizes'] 1")
    out = capsys.readouterr().out
    assert "memcheck: 1002 errors; tests: 1 failed, 1 passed\n" in out
    assert "not launched: lrn, lrn_dx\n    Invalid __global__ write of size 4 bytes\n    " in out
    assert "racecheck: 0 errors; tests: 2 passed\n" in out
    assert "initcheck: it counted no errors; tests: none; exit code -6: " in out


def test_a_memory_checker_that_hangs_is_stopped_with_what_it_started(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check_gpu, "TOOL_SECONDS", 2)
    monkeypatch.setattr(check_gpu, "SPARE_SECONDS", 0.9)
    child, number = "import time; time.sleep(600)", tmp_path / "number"
    pretend(
        f"import subprocess, sys, pathlib\nprocess = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(number)!r}).write_text(str(process.pid))\nprocess.wait()"
    )
    started = time.perf_counter()
    found = check_gpu.check_memory(argparse.Namespace(report=tmp_path, device=0), 3)
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
        importlib.metadata.distribution(check_gpu.WHEEL)
        pytest.skip("NVIDIA's wheel is installed")
    assert check_gpu.compute_sanitizer() == here
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
    assert check_gpu.compute_sanitizer() == here  # a file that is no program
    path.chmod(0o755)
    assert check_gpu.compute_sanitizer() == (here if place == "wheel" and here else str(path))


@pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
def test_what_is_checked_has_no_memory_pool(monkeypatch: pytest.MonkeyPatch, xp: Any) -> None:
    """It is off before the first array of ours, and stays so."""
    told: list[Any] = []
    monkeypatch.setattr(fake_cupy.cuda, "set_allocator", told.append)
    monkeypatch.setattr(check_gpu.OnGpu, "step", lambda network: told.append(network.x.shape))
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: told.append(arguments) or 5)
    assert check_gpu.watched(0, time.time(), ["some", "tests"]) == 5
    assert told == [None, (4, 3, 32, 32), ["-p", "no:cacheprovider", "some", "tests"]]


@pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
@pytest.mark.parametrize("in_time", [True, False])
def test_what_is_checked_launches_every_kernel(xp: Any, on_stand_in: None, in_time: bool) -> None:
    """Without the last of the tests, which are more sizes, and those in float64; too late, none begins."""
    assert check_gpu.CHECKED[-1].endswith("test_odd_sizes")
    few = [*check_gpu.CHECKED[:-1], "-k", "not float64"]
    command_line = [sys.executable, check_gpu.__file__, "watched", "0", str(time.time() + 600 * in_time), *few]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=check_gpu.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    counts, never = done.stdout.splitlines()[-2:]
    if in_time:
        assert never == check_gpu.NEVER
        assert check_gpu.counts_in(counts)["passed"] > 100
    else:
        assert {"augment", "lrn"} < set(never.removeprefix(check_gpu.NEVER).split(", ")) < check_gpu.kernels_of_ours()
        assert {"skipped", "deselected"} == set(check_gpu.counts_in(counts))


@pytest.mark.parametrize("xp", ["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_a_report_has_the_tests_and_the_memory_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xp: Any, on_stand_in: None, pretend: Pretend
) -> None:
    """The tests are two that need no GPU; those under the checker are six of the kernels'."""
    pretend(RUNS_IT)
    monkeypatch.setattr(check_gpu, "TOOLS", {"memcheck": check_gpu.TOOLS["memcheck"]})
    monkeypatch.setattr(
        check_gpu, "CHECKED", ["-m", "gpu", "tests/test_kernels_cuda.py", "-k", "augment and float32 and not textbook"]
    )
    tests = ["-m", "not gpu", "tests/test_benchmarks.py", "-k", "sizes_of or rates_of"]
    monkeypatch.setattr(check_gpu, "TESTS", tests)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--report", str(tmp_path / "report")])
    assert check_gpu.main() == 0
    found = json.loads((tmp_path / "report/check_gpu.json").read_text())
    assert found["tests"] == {
        "exit_code": 0,
        "summary": found["tests"]["summary"],
        "output": "tests.txt",
        "counts": found["tests"]["counts"] | {"passed": 2},
        "failures": [],
    }
    assert found["tests"]["summary"] in (tmp_path / "report/tests.txt").read_text()
    checked = found["memory_check"]["memcheck"]
    assert (checked["clean"], checked["exit_code"], checked["errors"], checked["why"]) == (True, 0, 0, None)
    assert checked["counts"]["passed"] == 6
    never = {"lrn", "lrn_dx"}  # neither in a step nor in those tests
    assert never < set(checked["not_launched"])
    assert not {"augment", "im2col", "gather"} & set(checked["not_launched"])
    assert "6 passed" in (tmp_path / "report/memcheck.txt").read_text()


@pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
def test_without_the_checker_and_with_tests_that_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xp: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_gpu, "TESTS", ["tests/no_such_file.py"])
    monkeypatch.setattr(check_gpu, "compute_sanitizer", lambda: None)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--report", str(tmp_path)])
    assert check_gpu.main() == 1
    found = json.loads((tmp_path / "check_gpu.json").read_text())
    assert found["tests"]["exit_code"] not in (0, None)
    assert found["tests"]["failures"] == []
    (why,) = found["memory_check"].values()
    assert why in capsys.readouterr().out.splitlines()
    assert why.startswith("skipped, as compute-sanitizer is neither on PATH nor in ")
    assert "pip install nvidia-cuda-sanitizer-api" in why


def test_without_a_gpu_there_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    assert check_gpu.main() == 1
    assert capsys.readouterr().err.startswith("check_gpu: error: the backend 'cupy' cannot be used here")


def test_it_takes_five_minutes_at_most() -> None:
    assert sum(check_gpu.SECONDS.values()) <= 300
    assert 2 * check_gpu.SPARE_SECONDS < check_gpu.TOOL_SECONDS <= check_gpu.SECONDS["memory_check"]
