"""Which module of kernels computes: by default, by name, and where Numba or CUDA cannot be used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fake_cupy
import numpy as np
import pytest

from minigrad import set_kernels
from minigrad.errors import BackendError
from minigrad.kernels import _load_or_textbook, kernels

ROOT = Path(__file__).resolve().parents[1]
HOST = np.zeros(1, np.float32)
ASK = "import numpy; from minigrad.kernels import kernels; print(kernels(numpy.ones(2)).__name__)\n"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has been chosen before, or is after."""
    monkeypatch.delenv("MINIGRAD_KERNELS", raising=False)
    _load_or_textbook.cache_clear()
    set_kernels(None)
    yield
    _load_or_textbook.cache_clear()
    set_kernels(None)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> fake_cupy.ndarray:
    """An array of the stand-in for CuPy."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    return fake_cupy.zeros(1, np.float32)


def name_of(module: ModuleType) -> str:
    return module.__name__.removeprefix("minigrad.kernels.")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_importing_minigrad_imports_no_kernels_numba_or_cupy() -> None:
    done = python(
        "import sys, minigrad, inception.models\n"
        "print([name for name in ('numba', 'cupy', 'minigrad.kernels.textbook') if name in sys.modules])"
    )
    assert done.stdout == "[]\n"


def test_without_numba_the_textbook_computes_and_one_line_says_so() -> None:
    """Python raises ModuleNotFoundError for a name that is None in sys.modules, as for one that is not installed."""
    done = python("import sys; sys.modules['numba'] = None\n" + ASK + ASK.replace("ones(2)", "float32(1)"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "minigrad.kernels.textbook\n" * 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "minigrad computes with the slower textbook kernels: Numba cannot be imported, ModuleNotFound"
    )
    assert line.endswith("pip install 'inception-minigrad[fast]'")


def test_a_numba_that_is_damaged_is_no_numba(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    done = python(ASK, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.stdout == "minigrad.kernels.textbook\n"
    assert "Numba needs NumPy 2.4 or less" in done.stderr


def test_the_line_can_be_silenced() -> None:
    silent = "import logging, sys; sys.modules['numba'] = None; logging.getLogger('minigrad').setLevel('ERROR')\n"
    done = python(silent + ASK)
    assert (done.stdout, done.stderr) == ("minigrad.kernels.textbook\n", "")


@pytest.mark.parametrize(("value", "module"), [("textbook", "textbook"), ("cuda", None), (None, None)])
def test_the_variable_chooses(monkeypatch: pytest.MonkeyPatch, value: str | None, module: str | None) -> None:
    pytest.importorskip("numba")
    by_default = name_of(kernels(HOST))
    assert by_default != "textbook"
    set_kernels(None)
    if value is not None:
        monkeypatch.setenv("MINIGRAD_KERNELS", value)
    assert name_of(kernels(HOST)) == (module or by_default)


def test_the_variable_must_name_a_module() -> None:
    done = python(ASK, MINIGRAD_KERNELS="textbok")
    assert done.stderr.splitlines()[-1] == (
        "minigrad.errors.BackendError: MINIGRAD_KERNELS: there is no kernel module 'textbok' — did you mean "
        "'textbook'? Choose from textbook, loops, cuda"
    )


def test_what_the_variable_names_must_be_there() -> None:
    done = python("import sys; sys.modules['numba'] = None\n" + ASK, MINIGRAD_KERNELS="loops")
    assert done.stdout == ""
    assert "BackendError: Numba cannot be imported" in done.stderr.splitlines()[-1]


def test_a_module_is_chosen_for_the_arrays_that_it_takes(device: fake_cupy.ndarray) -> None:
    by_default = [name_of(kernels(x)) for x in (HOST, device)]
    set_kernels("textbook")
    assert [name_of(kernels(x)) for x in (HOST, device)] == ["textbook", "textbook"]
    for name in ("cuda", "loops", None):
        set_kernels(name)
        assert [name_of(kernels(x)) for x in (HOST, device)] == by_default


def test_a_wrong_name_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_kernels("textbook")
    with pytest.raises(BackendError, match="there is no kernel module 'fast': choose from textbook, loops, cuda"):
        set_kernels("fast")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match="Numba cannot be imported"):
        set_kernels("loops")
    assert name_of(kernels(HOST)) == "textbook"


def test_without_cupy_there_is_no_cuda() -> None:
    done = python("import sys; sys.modules['cupy'] = None\nimport minigrad; minigrad.set_kernels('cuda')")
    assert "BackendError: the backend 'cupy' cannot be used here: CuPy is" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("trouble", ["rocm", "nvrtc", "cublas"])
def test_where_cuda_kernels_cannot_run_the_textbook_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: fake_cupy.ndarray, trouble: str
) -> None:
    from minigrad.kernels.cuda import cublas, launch

    launch.module.cache_clear()
    cublas.library.cache_clear()

    def fail(*args: object, **options: object) -> None:
        raise OSError(f"there is no {trouble} here")

    if trouble == "rocm":
        monkeypatch.setattr(fake_cupy.cuda.runtime, "is_hip", True)
    elif trouble == "nvrtc":
        monkeypatch.setattr(fake_cupy, "RawModule", fail)
    else:
        monkeypatch.setattr(cublas, "load", fail)
    said = {"rocm": "AMD's ROCm", "nvrtc": "there is no nvrtc here", "cublas": "there is no cublas here"}[trouble]
    with caplog.at_level(logging.WARNING, "minigrad"):
        assert name_of(kernels(device)) == name_of(kernels(device)) == "textbook"
    (message,) = caplog.messages
    assert said in message
    with pytest.raises(BackendError, match=said):
        set_kernels("cuda")


def test_the_module_is_found_in_less_than_a_microsecond() -> None:
    """A training step of a batch of one asks 300 times."""
    assert min(timeit.repeat(lambda: kernels(HOST), number=10_000, repeat=20)) / 10_000 < 1e-6
