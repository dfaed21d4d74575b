"""Whether it is right on this GPU: pytest -m gpu, and the tests of all kernels under NVIDIA's compute-sanitizer.

`python -m benchmarks.gpu_tests DEVICE END TESTS…` is the process that compute-sanitizer watches. CuPy's memory pool is
off in it: that hands out parts of large blocks, so that what lies past an array's end is mostly somebody's memory,
and no access there is an error to the GPU.
https://docs.nvidia.com/compute-sanitizer/ComputeSanitizer/index.html has the options, and what the lines mean.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.measure import Record, Workload
from benchmarks.ours import OnGpu
from benchmarks.profiling import replaced
from minigrad import set_backend
from minigrad.backend import default_module
from minigrad.kernels.cuda import conv, dense, launch, norm, optim, pictures, pool

ROOT = Path(__file__).parents[1]
TESTS = ["-m", "gpu"]

# Under compute-sanitizer, which is slow: what launches every kernel, at odd sizes, first; what repeats that, last.
CHECKED = [
    *("-m", "gpu", "tests/test_kernels_cuda.py", "tests/test_optim_gpu.py"),
    "tests/test_training_recipes.py::test_the_average_is_the_weighted_mean_of_all_that_was_seen",
    "tests/test_kernels.py::test_odd_sizes",
]
STEP = Workload("googlenet_small", 32, 10, 4)
WHEEL = "nvidia-cuda-sanitizer-api"
MARK = "compute-sanitizer: "  # before each line of its own
OPTIONS = [
    *("--prefix", MARK.strip(), "--print-limit", "20", "--show-backtrace", "device", "--target-processes", "all"),
    *("--destroy-on-device-error", "kernel", "--error-exitcode", "99"),
]
TOOLS = {  # in the order in which they run, each with what is for it alone
    # An error of a call raises in CuPy; libraries make calls that fail to learn what there is.
    "memcheck": ["--padding", "4096", "--report-api-errors", "no"],
    "racecheck": [],
    "initcheck": [],
}
TOOL_SECONDS = 90  # for one of them at most
SPARE_SECONDS = 15  # of these the last in which no test begins: for the one that runs, and for summing up
SUMMARY = re.compile(r"(?:ERROR SUMMARY: ([\d,]+) errors?|RACECHECK SUMMARY: ([\d,]+) hazards? displayed.*)")
NEVER = "kernels that were not launched: "


def run_tests(args: argparse.Namespace, seconds: float) -> Record:
    """pytest -m gpu, all that it says in a file beside the results."""
    if not tests_are_there():
        return {"why": "no pytest, or no folder tests"}
    command = [sys.executable, "-m", "pytest", "-ra", "--durations=10", "-p", "no:cacheprovider", *TESTS]
    path = folder_of(args) / "tests.txt"
    code = run_into(path, command, args.device, seconds)
    if code is None:
        with open(path, "a", encoding="utf-8") as file:
            print(f"the tests were not done within {seconds:.0f} seconds, and were stopped", file=file)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found: Record = {"exit_code": code, "summary": lines[-1] if lines else "", "output": path.name}
    found["counts"] = counts_in(found["summary"])
    found["failures"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    print(found["summary"], *found["failures"], f"all they say: {path}", sep="\n")
    return found


def tests_are_there() -> bool:
    there = importlib.util.find_spec("pytest") is not None and (ROOT / "tests").is_dir()
    if not there:
        print("no tests: they need pytest and the folder tests of the repository")
    return there


def folder_of(args: argparse.Namespace) -> Path:
    return args.report or Path(tempfile.mkdtemp())


def run_into(path: Path, command: list[str], device: int, seconds: float) -> int | None:
    """Run a program, what it says into a file; its exit code, None if it was stopped, with all that it has started."""
    with open(path, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"MINIGRAD_DEVICE": str(device), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # ours need none
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def counts_in(summary: str) -> dict[str, int]:
    """Of pytest's last line."""
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed)", summary)
    return {"error" if kind == "errors" else kind: int(count) for count, kind in counts}


# --- memory_check


def check_memory(args: argparse.Namespace, seconds: float) -> Record:
    """A record for each of TOOLS, all that it says in a file beside the results; or `why` nothing was checked."""
    program = compute_sanitizer()
    if program is None:
        why = (
            "skipped, as compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin, $CUDA_PATH/bin or "
            f"/usr/local/cuda/bin: pip install {WHEEL}, or install NVIDIA's CUDA toolkit"
        )
        print(why)
        return {"why": why}
    if not tests_are_there():
        return {"why": "no pytest, or no folder tests"}
    folder, end = folder_of(args), time.perf_counter() + seconds
    found: Record = {"program": program}
    for tool, options in TOOLS.items():
        left = min(TOOL_SECONDS, end - time.perf_counter())
        if left < 2 * SPARE_SECONDS:
            found[tool] = {"clean": False, "why": "not run, as there was no time left"}
            print(f"{tool}: {found[tool]['why']}")
            continue
        path = folder / f"{tool}.txt"
        command = [program, "--tool", tool, *OPTIONS, *options, sys.executable, "-m", "benchmarks.gpu_tests"]
        command += [str(args.device), str(time.time() + left - SPARE_SECONDS), *CHECKED]
        code = run_into(path, command, args.device, left)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found[tool] = verdict(code, lines) | {"output": path.name}
        print_verdict(tool, found[tool])
        print(f"all it says: {path}\n")
    return found


def compute_sanitizer() -> str | None:
    """Where it is: on PATH, in a CUDA toolkit, or in NVIDIA's wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    with suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution(WHEEL)
        folders += [
            str(wheel.locate_file(path.parent)) for path in wheel.files or [] if path.stem == "compute-sanitizer"
        ]
    places = [None, *folders]  # None: PATH
    return next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)


def verdict(code: int | None, lines: list[str]) -> Record:
    """What a run of compute-sanitizer says.

    clean          it found nothing, and has seen kernels that gave the right results
    errors         how many it counted; None if it did not come to that
    first_error    the lines of the first
    counts         of the tests that were run under it; those skipped began too late, or had another reason
    not_launched   kernels of ours that it has not seen; None if that is not known
    why            what the matter was beside errors
    """
    said = [line.partition(MARK)[2].rstrip() for line in lines if MARK.strip() in line]  # perhaps after pytest's dots
    sums = [match for line in said if (match := SUMMARY.fullmatch(line))]
    errors = sum(int((match[1] or match[2]).replace(",", "")) for match in sums) if sums else None
    told = [line for line in said if line != "COMPUTE-SANITIZER" and not SUMMARY.fullmatch(line)]
    first = itertools.takewhile(bool, itertools.dropwhile(operator.not_, told))  # up to an empty line
    counts = next((counts_in(line) for line in reversed(lines) if re.match(r"=* ?\d+ \w+.* in [\d.]+s", line)), {})
    never = next((line.removeprefix(NEVER) for line in lines if line.startswith(NEVER)), None)
    why = None
    if code is None:
        why = "stopped, as it was not done in time"
    elif errors is None or (code and not errors):
        last = [line.strip() for line in told or lines if line.strip()]
        why = f"exit code {code}: {last[-1] if last else 'it said nothing'}"
    elif not counts.get("passed"):
        why = "no test has passed under it"
    return {
        "clean": code == 0 and errors == 0 and why is None,
        "exit_code": code,
        "errors": errors,
        "first_error": [] if errors == 0 else list(first)[:10],
        "counts": counts,
        "not_launched": None if never is None else [name for name in never.split(", ") if name],
        "why": why,
    }


def print_verdict(tool: str, found: Record) -> None:
    errors = "it counted no errors" if found["errors"] is None else f"{found['errors']} errors"
    tests = ", ".join(f"{count} {kind}" for kind, count in found["counts"].items() if kind != "deselected")
    print(f"{tool}: {errors}; tests: {tests or 'none'}" + (f"; {found['why']}" if found["why"] else ""))
    if found["not_launched"]:
        print(f"{NEVER}{', '.join(found['not_launched'])}")
    for line in found["first_error"]:
        print(f"    {line}")


# --- The process that is watched


def watched(device: int, end: float, tests: list[str]) -> int:
    """A training step and tests, each array in memory of its own; no test begins after the moment `end`, as the checker
    sums up what comes to its own end only. Returns pytest's exit code."""
    import pytest

    class Until:
        def pytest_runtest_setup(self) -> None:
            if time.time() > end:
                pytest.skip("no time left")

    launched = set()

    def seen(_: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launch)
        def run(source: str, kernel: str, *args: Any, **options: Any) -> Any:
            launched.add(kernel)
            return launch(source, kernel, *args, **options)

        return run

    set_backend("cupy", device)
    cupy: Any = default_module()
    cupy.cuda.set_allocator(None)
    with replaced([(room, "launch") for room in (conv, norm, pool, dense, pictures, optim)], seen):
        OnGpu(STEP, device, "float32").step()
        code = pytest.main(["-p", "no:cacheprovider", *tests], plugins=[Until()])
    print(NEVER + ", ".join(sorted(kernels_of_ours() - launched)))
    return int(code)


def kernels_of_ours() -> set[str]:
    sources = Path(launch.__file__).parent.glob("*.cu")
    return {name for path in sources for name in re.findall(r"^KERNEL (\w+)", path.read_text(encoding="utf-8"), re.M)}


if __name__ == "__main__":
    sys.exit(watched(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
