"""Shared fixtures: `xp` runs a test once on each backend."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cuda_on_cpu
import fake_cupy
import pytest
from kernel_cases import TOLERANCE, Case, Check, arguments, assert_close, bring_all, call, expected, scale_of
from leaves import Make, leaf_on

from minigrad import backend
from minigrad.kernels import kernels, set_kernels

MODULES = {"numpy": "numpy", "textbook": "numpy", "fake_cupy": "cupy", "cupy": "cupy"}


STEP = """
import numpy as np
from inception.models import create_model
from minigrad import Tensor, no_grad, ops
model = create_model("googlenet_small", width=0.25)
pictures = Tensor(np.ones((8, 3, 32, 32), "float32"))
ops.cross_entropy(model(pictures), np.zeros(8, "int64")).backward()
with no_grad():
    model.eval()(pictures)
"""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the kernels once, where they have not been: the first process to use them says so on standard error,
    which tests compare."""
    subprocess.run([sys.executable, "-c", STEP], check=True, capture_output=True, cwd=session.config.rootpath)


@functools.cache
def reason_against_cupy() -> str:
    """Why the real CuPy cannot be used on this machine; empty if it can. Asked once: it is slow with a GPU."""
    code, sentence = backend.cupy_status()
    return "" if code == "ok" else sentence


@pytest.fixture(params=["numpy", "textbook", "fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The array module of one backend, which is also where new tensors are made until the test ends.

    numpy       the host
    textbook    the same, with the textbook's kernels
    fake_cupy   a stand-in that refuses what CuPy refuses; it is `cupy` for the time of the test
    cupy        the GPU; skipped with the reason where there is none
    """
    if request.param == "cupy" and reason_against_cupy():
        pytest.skip(reason_against_cupy())
    before = backend.backend(), backend.precision()
    if request.param == "fake_cupy":
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    backend.set_backend(MODULES[request.param])
    if request.param == "fake_cupy":
        fake_cupy.SYNCS.clear()  # set_backend's own smoke test reads one number back
    if request.param == "textbook":
        set_kernels("textbook")
    yield importlib.import_module(MODULES[request.param])
    set_kernels(None)
    backend.set_backend(before[0])
    backend.set_precision(before[1])


# ---- Kernels ----


@pytest.fixture
def k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, xp: Any) -> Any:
    """The kernel module for xp's arrays, or the textbook; "reversed" runs the threads of CUDA kernels last to first."""
    monkeypatch.setattr(cuda_on_cpu, "REVERSED", request.param == "reversed")
    if request.param == "textbook":
        set_kernels("textbook")
    return kernels(xp.zeros(1))


@pytest.fixture(params=["default", "textbook"])
def host_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that asks for no `xp` once with each module of kernels for host arrays."""
    set_kernels(None if request.param == "default" else request.param)
    yield
    set_kernels(None)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def check(k: Any, xp: Any, dtype: str) -> Check:
    """check(case) compares the fast kernel with the definition."""

    def check(case: Case, **how: str) -> None:
        results = call(k, case.name, bring_all(xp, case.name, arguments(case), dtype, **how), dtype)
        for actual, wanted in zip(results, expected(case), strict=True):
            exact = case.name == "max_pool"
            assert_close(actual, wanted, 0 if exact else TOLERANCE[dtype], scale_of(case))

    return check


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command, with tiny workloads, and without peers: PyTorch takes seconds to import."""
    from tiny_benchmark import TINY

    import benchmarks.__main__ as command  # here, as few tests need it
    from benchmarks import parts

    monkeypatch.setattr(command, "WORKLOADS", {"small": TINY, "googlenet": TINY})
    growth = {
        name: ("googlenet_small", 10, [(8, 1), (8, 2)] if name.endswith("batch") else [(8, 2), (12, 2)], 2)
        for name in parts.GROWTH
    }
    monkeypatch.setattr(parts, "GROWTH", growth)
    monkeypatch.setattr(command, "installed", lambda: ["ours"])

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        try:
            code = command.main()
        except SystemExit as stop:
            code = int(str(stop.code))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def make(xp: Any) -> Make:
    """Leaves on the backend of the test, float64 and channels-last unless asked otherwise."""
    return functools.partial(leaf_on, xp)
