"""The backend switch, the diagnosis of CuPy, and the stand-in for CuPy that the other tests rely on."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest

import minigrad
from minigrad import backend
from minigrad.backend import (
    array_module,
    asarray,
    cupy_status,
    default_module,
    memory_report,
    module_named,
    set_backend,
    set_precision,
    to_host,
)
from minigrad.errors import BackendError
from minigrad.layout import empty_images
from minigrad.random import Key, bits

needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")


# ---- Arrays and where they live ----


def test_array_module_is_chosen_by_type(xp: Any) -> None:
    assert array_module(xp.zeros(3)) is xp
    assert array_module(np.zeros(3)) is array_module(np.float32(1)) is np
    for stranger in ([1.0], 1.0, None):
        with pytest.raises(BackendError, match=rf"{type(stranger).__name__} where .* numpy\.asarray, or take"):
            array_module(stranger)


def test_asarray_and_to_host(xp: Any) -> None:
    host = np.arange(6, dtype=np.float32).reshape(2, 3).T
    here = asarray(host)
    assert default_module() is xp is array_module(here)
    assert here.dtype == np.float32
    assert asarray(here) is here
    assert asarray([1, 2], dtype="float64").dtype == np.float64
    assert asarray(here, dtype=np.float64).dtype == np.float64
    back = to_host(here)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, host)
    assert to_host(host) is host


def test_a_device_array_stays_there_when_the_default_is_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(backend, "_backend", "numpy")
    x = fake_cupy.zeros(3, "float32")
    assert asarray(x) is x
    assert asarray(x, np.float64).dtype == np.float64
    assert isinstance(asarray(x, np.float64), fake_cupy.ndarray)


def test_memory_report(xp: Any) -> None:
    report = memory_report()
    assert 2**20 < report.peak_resident < 2**50
    assert (report.pool_used is None) == (xp is np)
    words = (
        r"at most \d+\.\d\d GB of the host" if xp is np else r"of the GPU's \d+\.\d\d GB, \d+\.\d\d GB are in arrays"
    )
    assert re.match(words, str(report))


def test_the_peak_of_a_process_is_its_own() -> None:
    """Not what its parent had when it was started."""
    large = np.ones(2**26)  # 512 MB
    peak = int(python("from minigrad.backend import memory_report; print(memory_report().peak_resident)"))
    assert peak < large.nbytes < memory_report().peak_resident


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match=r"^there is no backend 'jax': choose from numpy, cupy$"):
        set_backend("jax")


def test_switching_to_cupy_without_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    before = backend.backend()
    with pytest.raises(BackendError, match=r"^the backend 'cupy' cannot be .*pip install 'cupy-cuda13x\[ctk\]'"):
        set_backend("cupy")
    assert backend.backend() == before


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with these environment variables on top."""
    paths = [str(Path(minigrad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_LATE = """
import sys, minigrad.backend as b
assert b._backend is None and "cupy" not in sys.modules
sys.modules["cupy"] = None
try:
    print(b.backend(), b.default_module().__name__)
except b.BackendError as error:
    print("BackendError", error)
b.set_backend("numpy")
assert b.backend() == "numpy"
"""


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("numpy", "numpy numpy"),
        ("cupy", "BackendError MINIGRAD_BACKEND: the backend 'cupy' cannot be used here: CuPy is not installed"),
        ("", "BackendError MINIGRAD_BACKEND: there is no backend ''"),
        ("nunpy", "BackendError MINIGRAD_BACKEND: there is no backend 'nunpy' — did you mean 'numpy'?"),
    ],
)
def test_environment_variable_is_read_at_first_use(value: str, answer: str) -> None:
    assert python(READ_LATE, MINIGRAD_BACKEND=value).startswith(answer)


# ---- One of several GPUs ----


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> Iterator[Any]:
    monkeypatch.setattr(cupy.cuda.runtime, "devices", 2)
    monkeypatch.setattr(backend, "_chosen", None)
    yield cupy
    set_backend("numpy")
    cupy.cuda.runtime.current = 0


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch, two_gpus: Any) -> None:
    runtime = two_gpus.cuda.runtime
    set_backend("cupy", device=1)
    assert runtime.getDevice() == 1
    set_backend("cupy")  # stays there
    assert runtime.getDevice() == 1
    monkeypatch.setenv("MINIGRAD_DEVICE", "0")
    set_backend("cupy")
    assert runtime.getDevice() == 0
    set_backend("cupy", device=1)  # said here, it wins
    assert runtime.getDevice() == 1
    assert_status("ok", r"2 device\(s\), number 1 is Pretend GPU", device=1)


def test_every_thread_works_on_the_gpu_that_was_chosen(monkeypatch: pytest.MonkeyPatch, two_gpus: Any) -> None:
    """CUDA's current device belongs to the thread, and is GPU 0 when a thread begins."""
    set_backend("cupy", device=1)
    x = asarray(np.ones(2))
    runtime, seen = two_gpus.cuda.runtime, []

    def work() -> None:
        runtime.current = 0  # as the driver has it in a new thread
        seen.extend([asarray(np.ones(2)).device.id, runtime.getDevice()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (x.device.id, seen) == (1, [1, 1])
    assert_status("ok", r"2 device\(s\), number 1 is Pretend GPU")  # the one it is on


def test_a_thread_that_has_been_placed_stays_there(two_gpus: Any) -> None:
    """Whoever has chosen another GPU in the meantime."""
    runtime, seen = two_gpus.cuda.runtime, []
    set_backend("cupy", device=0)

    def work() -> None:
        set_backend("cupy", device=1)
        seen.append(asarray(np.ones(2)).device.id)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    runtime.current = 0  # as it is in this thread
    assert seen == [1]
    assert asarray(np.ones(2)).device.id == 0
    assert module_named("cupy") is two_gpus


@pytest.mark.parametrize(
    ("devices", "device", "words"),
    [
        (2, 2, "the backend 'cupy' cannot be used here: there is no GPU 2 on this .* has 2 GPUs, 0 to 1$"),
        (1, 1, "there is no GPU 1 on this machine, which has 1 GPU, number 0$"),
        (2, -1, "there is no GPU -1 "),
    ],
)
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, two_gpus: Any, devices: int, device: int, words: str
) -> None:
    monkeypatch.setattr(two_gpus.cuda.runtime, "devices", devices)
    with pytest.raises(BackendError, match=words):
        set_backend("cupy", device=device)
    assert two_gpus.cuda.runtime.getDevice() == 0
    assert backend.backend() == "numpy"


def test_the_host_has_no_devices_and_a_number_is_a_number(monkeypatch: pytest.MonkeyPatch, two_gpus: Any) -> None:
    with pytest.raises(BackendError, match="there is a device 1 on the backend 'cupy' alone, not on 'numpy'"):
        set_backend("numpy", device=1)
    monkeypatch.setenv("MINIGRAD_DEVICE", "cuda:1")
    with pytest.raises(BackendError, match="MINIGRAD_DEVICE: 'cuda:1' is not the number of a GPU: 0, 1, …"):
        set_backend("cupy")


def test_the_command_line_chooses_gpu_and_precision(
    monkeypatch: pytest.MonkeyPatch, two_gpus: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from inception.__main__ import main

    assert main(["compare", "googlenet_small", "--backend", "cupy", "--device", "1", "--precision", "tf32"]) == 0
    assert (two_gpus.cuda.runtime.getDevice(), backend.precision()) == (1, "tf32")
    set_precision("float32")
    set_backend("numpy")
    for words, message in (
        (["--backend", "cupy", "--device", "5"], "there is no GPU 5 on this machine, which has 2 GPUs, 0 to 1"),
        (["--device", "1"], "there is a device 1 on the backend 'cupy' alone"),
        (["--precision", "tf32"], "the precision 'tf32' is for products on a GPU"),
    ):
        capsys.readouterr()
        assert main(["compare", "googlenet_small", *words]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("MINIGRAD_BACKEND", "cupy")
    assert main(["compare", "googlenet_small", "--device", "0"]) == 0
    assert two_gpus.cuda.runtime.getDevice() == 0


# ---- Precision ----


@pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)
def test_precision_is_a_setting(xp: Any) -> None:
    assert backend.precision() == "float32"
    set_precision("tf32")
    assert backend.precision() == "tf32"
    with pytest.raises(BackendError, match="there is no precision 'half': choose from float32, tf32"):
        set_precision("half")
    assert backend.precision() == "tf32"
    set_backend("numpy")
    with pytest.raises(BackendError, match=r"'tf32' is for products on a GPU and the backend is 'numpy'.*choose the"):
        asarray([1.0])
    set_precision("float32")
    asarray([1.0])


def test_tf32_is_refused_on_the_host() -> None:
    with pytest.raises(BackendError, match="the precision 'tf32' is for products on a GPU and the backend is 'numpy'"):
        set_precision("tf32")
    assert backend.precision() == "float32"
    asarray([1.0])


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("float32", "numpy numpy"),
        ("tf32", "BackendError the precision 'tf32' is for products on a GPU"),
        ("", "BackendError MINIGRAD_PRECISION: there is no precision ''"),
    ],
)
def test_precision_is_read_from_the_environment(value: str, answer: str) -> None:
    ask = READ_LATE.replace('b.set_backend("numpy")', 'b.set_precision("float32")')
    assert python(ask, MINIGRAD_PRECISION=value, MINIGRAD_BACKEND="numpy").startswith(answer)


# ---- The diagnosis, row by row ----


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("import some_wheel_it_needs", "broken", "No module named 'some_wheel_it_needs'"),
        ("raise RuntimeError('two lines\\nof text')", "broken", r"RuntimeError \(two lines\)"),
    ],
)
def test_cupy_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, code: str, words: str
) -> None:
    (tmp_path / "cupy.py").write_text(source)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert_status(code, words)


def test_cupy_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert_status("not_installed", r"pip install 'cupy-cuda13x\[ctk\]' \(NVIDIA driver 580 or newer\)")


def assert_status(code: str, words: str, **options: Any) -> None:
    actual, sentence = cupy_status(**options)
    assert actual == code
    assert re.search(words, sentence), sentence
    assert "\n" not in sentence


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in as `cupy`, in an environment that hides no GPU."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(backend, "_cupy_wheels", lambda: ["cupy-cuda13x"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake_cupy


@pytest.mark.parametrize(
    ("driver", "error", "devices", "code", "words"),
    [
        (0, 35, 0, "no_driver", "no NVIDIA driver"),
        (12080, 35, 0, "old_driver", r"supports CUDA 12\.8 but .* needs 13\.x: update .* 'cupy-cuda12x\[ctk\]'"),
        (13000, 100, 0, "no_device", "no GPU"),
        (13000, None, 0, "no_device", "no GPU"),
        (13000, 803, 0, "driver_error", "803"),
        (13000, 999, 0, "driver_error", "999"),
        (13000, None, 2, "ok", r"2 device\(s\), the first is Pretend GPU, sm_90, the driver supports CUDA 13\.0"),
    ],
)
def test_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, cupy: Any, driver: int, error: int | None, devices: int, code: str, words: str
) -> None:
    for name, value in {"driver": driver, "error": error, "devices": devices}.items():
        monkeypatch.setattr(cupy.cuda.runtime, name, value)
    assert_status(code, words)


@pytest.mark.parametrize("error", [100, None])
def test_hidden_devices_are_named(monkeypatch: pytest.MonkeyPatch, cupy: Any, error: int | None) -> None:
    monkeypatch.setattr(cupy.cuda.runtime, "devices", 0)
    monkeypatch.setattr(cupy.cuda.runtime, "error", error)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert_status("no_device", "CUDA_VISIBLE_DEVICES is '7'")


class DynamicLibNotFoundError(RuntimeError):
    """What the package cuda.pathfinder raises; backend.py knows it by this name."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ImportError("Failure finding libcublasLt.so.13"),
            "no_libs",
            r"libcublasLt.*pip install 'cupy-cuda13x\[ctk\]'",
        ),
        (DynamicLibNotFoundError("libnvrtc.so"), "no_libs", r"libnvrtc.*\[ctk\]"),
        (RuntimeError("Failed to find CUDA headers"), "no_libs", r"headers.*\[ctk\]"),
        (RuntimeError("illegal address\nsecond line"), "failed", r"illegal address\)$"),
        (MemoryError(), "failed", "MemoryError"),
        (None, "failed", "came back wrong"),
    ],
)
def test_what_the_first_product_says(
    monkeypatch: pytest.MonkeyPatch, cupy: Any, error: Exception | None, code: str, words: str
) -> None:
    def product(a: Any, b: Any) -> Any:
        if error is None:
            return a
        raise error

    monkeypatch.setattr(cupy.ndarray, "__matmul__", product)
    assert_status(code, words)
    assert_status("ok", "Pretend GPU", smoke=False)


def test_two_wheels_are_reported(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    monkeypatch.setattr(backend, "_cupy_wheels", lambda: ["cupy-cuda12x", "cupy-cuda13x"])
    assert_status("ok", r"several CuPy packages are installed \(cupy-cuda12x, cupy-cuda13x\): keep one")


def test_the_diagnosis_never_raises(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    monkeypatch.setattr(cupy.cuda, "runtime", None)
    assert_status("failed", "probing CuPy failed with AttributeError")


@needs_cupy
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"PRETEND_DRIVER": "11080"}, "old_driver", r"supports CUDA 11\.8"),
        ({"PRETEND_DRIVER": "13020", "PRETEND_INIT": "100"}, "no_device", "CUDA_VISIBLE_DEVICES is ''"),
        ({"PRETEND_DRIVER": "13020", "PRETEND_INIT": "803"}, "driver_error", "driver combination"),
        ({"PRETEND_DRIVER": "13020", "PRETEND_INIT": "999"}, "driver_error", "unknown error"),
    ],
)
def test_what_a_pretended_driver_tells_the_real_cupy(
    tmp_path: Path, settings: dict[str, str], code: str, words: str
) -> None:
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("pretend_cuda.c")], check=True)
    ask = "from minigrad.backend import cupy_status; print(*cupy_status())"
    said = python(ask, LD_LIBRARY_PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="", **settings)
    assert re.match(f"{code} .*{words}", said), said


# ---- The stand-in refuses what CuPy refuses ----


def device(*shape: int) -> Any:
    return fake_cupy.ones(shape, "float32")


def host(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


KERNELS = """
extern "C" __global__ void scale(float* x, int n, double factor) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= factor;
}
extern "C" __global__ void diverge(float* x) {
  if (threadIdx.x > 0) __syncthreads();
}
"""


def launched(*args: Any, kernel: str = "scale", grid: tuple[int, ...] = (2, 1), block: tuple[int, ...] = (4, 1)) -> Any:
    fake_cupy.RawModule(code=KERNELS).get_function(kernel)(grid, block, args)
    return args[0]


MISTAKES: dict[str, Callable[[], Any]] = {
    "a kernel's int as a Python integer, 64 bits": lambda: launched(device(5), 5, 2.0),
    "a kernel's int as int64": lambda: launched(device(5), np.int64(5), 2.0),
    "a kernel's double as float32": lambda: launched(device(5), np.int32(5), np.float32(2)),
    "a kernel's double as an integer": lambda: launched(device(5), np.int32(5), 2),
    "a kernel's pointer as a host array": lambda: launched(host(5), np.int32(5), 2.0),
    "a kernel's int as a host array": lambda: launched(device(5), np.array(5, np.int32), 2.0),
    "a kernel's float* as a float64 array": lambda: launched(device(5).astype("float64"), np.int32(5), 2.0),
    "a kernel's float* as a strided array": lambda: launched(device(9)[::2], np.int32(5), 2.0),
    "a kernel with an argument too few": lambda: launched(device(5), np.int32(5)),
    "a grid that is too high": lambda: launched(device(5), np.int32(5), 2.0, grid=(1, 2**16)),
    "a block of too many threads": lambda: launched(device(5), np.int32(5), 2.0, block=(64, 32)),
    "an empty grid": lambda: launched(device(5), np.int32(5), 2.0, grid=(0, 1)),
    "__syncthreads in a branch": lambda: launched(device(5), kernel="diverge"),
    "device + host": lambda: device(3) + host(3),
    "host + device": lambda: host(3) + device(3),
    "device * 0-d host array": lambda: device(3) * np.array(2.0),
    "np.asarray(device)": lambda: np.asarray(device(3)),
    "np.array(device)": lambda: np.array(device(3)),
    "np.ascontiguousarray(device)": lambda: np.ascontiguousarray(device(3)),
    "host[...] = device": lambda: host(3).__setitem__(..., device(3)),
    "device[1:] = host": lambda: device(3).__setitem__(slice(1, None), host(2)),
    "matmul(device, host)": lambda: fake_cupy.matmul(device(2, 2), host(2, 2)),
    "cupy.concatenate([device, host])": lambda: fake_cupy.concatenate([device(2), host(2)]),
    "np.concatenate([device, host])": lambda: np.concatenate([device(2), host(2)]),
    "np.add(device, device, out=host)": lambda: np.add(device(2), device(2), out=host(2)),
    "where(host mask)": lambda: fake_cupy.where(host(2) > 0.5, device(2), 0),
    "host += device": lambda: host(2).__iadd__(device(2)),
    "device += host": lambda: device(2).__iadd__(host(2)),
    "errstate": lambda: fake_cupy.errstate(all="ignore"),
    "sum(where=)": lambda: fake_cupy.sum(device(2), where=True),
    "np.sum(device, where=)": lambda: np.sum(device(2), where=True),
    "max(initial=)": lambda: device(2).max(initial=0),
    "multiply(where=)": lambda: fake_cupy.multiply(device(2), 2, where=True),
    "zeros(device=)": lambda: fake_cupy.zeros(2, device="cpu"),
    "random.default_rng": lambda: fake_cupy.random.default_rng(0),
    "device.ctypes": lambda: device(2).ctypes,
    "nditer": lambda: fake_cupy.nditer(device(2)),
    "np.add.at(host, i, device)": lambda: np.add.at(host(3), np.array([0, 1]), device(2)),
    "add.at": lambda: fake_cupy.add.at(device(3), 0, 1),
    "einsum(device, host)": lambda: fake_cupy.einsum("ij,jk", device(2, 2), host(2, 2)),
    "dropout mask from the host": lambda: device(4, 4) * (host(4, 4) > 0.5),
    "matmul(out=not C-contiguous)": lambda: fake_cupy.matmul(device(2, 2), device(2, 2), out=device(2, 2).T),
    "reshape(copy=False) that must copy": lambda: device(2, 3).T.reshape(6, copy=False),
    "range(device)": lambda: range(fake_cupy.arange(1)[0]),
    "hash(device)": lambda: hash(device(1)),
    "device @= device": lambda: device(2, 2).__imatmul__(device(2, 2)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_stand_in_refuses(mistake: str) -> None:
    with pytest.raises((TypeError, AttributeError, ValueError, RuntimeError)):
        MISTAKES[mistake]()


def test_stand_in_runs_kernels() -> None:
    fake_cupy.SYNCS.clear()
    x = fake_cupy.ones(9, "float32")
    launched(x[1:], np.int32(7), 2.0)
    assert not fake_cupy.SYNCS
    np.testing.assert_array_equal(x.get(), [1, *[2] * 7, 1])


def test_stand_in_accepts_legal_uses_without_waiting() -> None:
    cp = fake_cupy
    a, b, matrix = device(2, 3, 4, 4), device(2, 3, 4, 4), device(6, 16)
    cp.SYNCS.clear()
    results = [
        a + b, 2 * a, a * np.float32(2), -a, abs(a), 1 / a, a**0.5, (a > 0.5) & (b > 0.5), ~(a > 0), a @ b,
        np.exp(a), np.sum(a, axis=1), np.concatenate([a, b], axis=1), np.zeros_like(a),
        cp.maximum(a, 0), cp.where(a > 0, a, 0), cp.take_along_axis(a, cp.argsort(a, 1), 1), cp.pad(a, 1),
        cp.einsum("nchw,nchw->c", a, b), cp.arange(3), cp.full((2, 2), 7), cp.stack([a, b]), cp.sqrt(a, out=b),
        a.sum(), a.sum(axis=0, dtype=cp.float64), a.mean((0, 2, 3), keepdims=True), a.max(axis=1), a.astype(cp.float16),
        a.ravel(), a.copy(), a.T, a.transpose(0, 2, 3, 1), a.reshape(2, -1, copy=False), a[:, None, 1:], a[..., ::-1],
        a[cp.asarray([0, 1]), np.array([0, 2])], matrix.T @ matrix, cp.matmul(matrix, matrix.T, out=cp.empty((6, 6))),
        cp.lib.stride_tricks.as_strided(a, (2, 2), (4, 4)),
    ]  # fmt: skip
    assert all(isinstance(result, cp.ndarray) for result in results)
    assert a.sum().shape == ()
    assert (a.ndim, a.size, a.nbytes, a.itemsize, len(a)) == (4, 96, 384, 4, 2)
    assert not cp.SYNCS


def test_stand_in_writes_through_views() -> None:
    a = device(2, 3)
    column = a[:, 1]
    column += 1
    a.T[0] = 5
    a.reshape(-1)[2] *= 7
    np.testing.assert_array_equal(a.get(), [[5, 2, 7], [5, 2, 1]])
    memory = host(3)
    there = fake_cupy.asarray(memory)
    there += 1
    np.testing.assert_array_equal(memory, 1)


def test_stand_in_lays_results_out_as_cupy_does() -> None:
    x = empty_images(fake_cupy, (2, 3, 4, 5), "float32")  # channels-last strides
    for fresh in (x + 1, fake_cupy.exp(x), fake_cupy.where(x > 0, x, 0), x[[0, 1]], x.copy()):
        assert fresh.flags.c_contiguous
    for kept in (x[:1], fake_cupy.empty_like(x), fake_cupy.zeros_like(x), x.astype("float64"), np.add(x, 1, out=x)):
        assert kept.transpose(0, 2, 3, 1).flags.c_contiguous


def test_stand_in_poisons_what_was_never_written() -> None:
    assert np.isnan(fake_cupy.empty((2, 2)).get()).all()
    assert np.isnan(fake_cupy.empty_like(device(2)).get()).all()


def test_stand_in_counts_waits_by_line(cupy: Any) -> None:
    fake_cupy.SYNCS.clear()
    a = device(3)
    float(a.sum()), bool(a.any()), int(a[0]), a[0].item(), a.get(), to_host(a), a[a > 0], fake_cupy.asnumpy(a)
    fake_cupy.cuda.Device().synchronize()
    assert sum(fake_cupy.SYNCS.values()) == 9
    assert len(fake_cupy.SYNCS) == 2
    assert all(where.startswith("test_backend.py:") for where in fake_cupy.SYNCS)


def test_random_bits_are_the_same_on_every_backend(xp: Any) -> None:
    key = Key(3).fold("dropout", 17)
    rows = np.array([5, 1, 2**40])
    for options in ({}, {"rows": rows}):
        there = bits(key, (3, 1000), xp=xp, **options)
        assert array_module(there) is xp
        np.testing.assert_array_equal(to_host(there), bits(key, (3, 1000), **options))


# ---- Names: what minigrad calls exists in CuPy, and the stand-in's list is right ----

SOURCES = sorted(Path(minigrad.__file__).parent.rglob("*.py"))
NAMES = sorted({name for file in SOURCES for name in re.findall(r"\bxp\.([a-z]\w*)", file.read_text())})


@pytest.mark.parametrize("module", ["fake_cupy", pytest.param("cupy", marks=needs_cupy)])
def test_every_function_that_minigrad_uses_exists(module: str) -> None:
    cp = importlib.import_module(module)
    assert len(NAMES) > 10
    assert [name for name in NAMES if not hasattr(cp, name)] == []


@needs_cupy
def test_what_the_stand_in_lacks_is_missing_from_cupy() -> None:
    cp = importlib.import_module("cupy")
    public = {name for name in dir(np) if not name.startswith("_")}
    assert {name for name in public if not hasattr(cp, name)} <= fake_cupy.MISSING_FUNCTIONS
    assert {name for name in fake_cupy.MISSING_FUNCTIONS if hasattr(cp, name)} == set()
    assert {name for name in fake_cupy.MISSING_METHODS if hasattr(cp.ndarray, name)} == set()
