"""NumPy or CuPy: which module an array belongs to, where new arrays are made, and how they move.

Code that computes never asks for the backend, it asks the array: `xp = array_module(x)`. The default backend
only decides where *new* arrays are made. It is NumPy, unless `set_backend("cupy")` or the environment variable
MINIGRAD_BACKEND says otherwise; the variable is read when the default is first needed. CuPy is imported when it
is chosen, never by importing minigrad.

Which GPU, where there are several, is `set_backend("cupy", device=1)` or MINIGRAD_DEVICE. How exactly a GPU multiplies
float32 is a setting too, `set_precision` or MINIGRAD_PRECISION, in the same manner.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
import threading
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minigrad.errors import BackendError, no_such

Array = Any  # numpy.ndarray or cupy.ndarray

BACKENDS = ("numpy", "cupy")
MOVE = "move one, with model.to, or minigrad.backend.asarray (after set_backend('cupy')) or to_host"  # in messages

PRECISIONS = ("float32", "tf32")

_backend: str | None = None  # None until the first use or the first set_backend
_precision: str | None = None  # the same, with set_precision
_chosen: int | None = None  # the GPU that was chosen by its number last, in whatever thread
_thread = threading.local()  # has_begun: whether this thread has been placed


def array_module(x: Array) -> ModuleType:
    """The module whose functions work on x: `numpy`, or `cupy` for a device array.

    Raises BackendError if x is no array.
    """
    return _module_of(type(x))  # type: ignore[arg-type]  # mypy: types are no Hashable


@functools.cache  # asked thousands of times in a training step
def _module_of(kind: type) -> ModuleType:
    if issubclass(kind, (np.ndarray, np.generic)):
        return np
    package = kind.__module__.partition(".")[0]
    if package == "cupy" and package in sys.modules:
        return sys.modules[package]
    raise BackendError(
        f"got {kind.__module__}.{kind.__qualname__} where a NumPy or CuPy array is wanted: convert it with "
        "numpy.asarray, or take a Tensor's .data"
    )


def set_backend(name: str, device: int | None = None) -> None:
    """Make new arrays with "numpy" or with "cupy" from here on; arrays that exist stay where they are.

    device   which GPU this thread works on, from 0, and every thread that makes its first array after this and that
             nobody has placed; None: MINIGRAD_DEVICE, or the one that CuPy is on

    Raises BackendError if the name is unknown, if CuPy cannot be used here (with the reason and the remedy), or if
    there is no such GPU (with their number).
    """
    global _backend
    _backend = _usable(name, device=device)


def backend() -> str:
    """The default backend's name, "numpy" or "cupy".

    Raises BackendError like `set_backend`, if the name came from MINIGRAD_BACKEND and cannot be used; and if it is
    "numpy" where the precision is one that only a GPU has.
    """
    global _backend
    if _backend is None:
        _backend = _usable(os.environ.get("MINIGRAD_BACKEND", "numpy"), "MINIGRAD_BACKEND: ")
    if _backend == "numpy" and precision() != "float32":
        raise BackendError(
            f"the precision {precision()!r} is for products on a GPU and the backend is 'numpy', which has float32 and "
            "float64 alone: choose the backend 'cupy', or the precision 'float32'"
        )
    return _backend


def set_precision(name: str) -> None:
    """Multiply float32 on the GPU from here on in "float32", or in "tf32", for speed.

    TF32 rounds the factors of a product to 10 bits of fraction, about three digits, for the GPU's tensor cores; sums
    are float32 still, and so are all other ops and all that is stored. float64 stays float64 throughout.

    Raises BackendError if the name is unknown, or "tf32" where the backend is NumPy: set that first.
    """
    global _precision
    before, _precision = _precision, _known(name, "precision", PRECISIONS, "")
    try:
        backend()
    except BackendError:
        _precision = before
        raise


def precision() -> str:
    """How float32 is multiplied on a GPU, "float32" or "tf32".

    Raises BackendError if the name came from MINIGRAD_PRECISION and is unknown.
    """
    global _precision
    if _precision is None:
        given = os.environ.get("MINIGRAD_PRECISION", "float32")
        _precision = _known(given, "precision", PRECISIONS, "MINIGRAD_PRECISION: ")
    return _precision


def default_module() -> ModuleType:
    """The module where new arrays are made: `numpy` or `cupy`."""
    name = backend()
    xp = importlib.import_module(name)
    if name == "cupy" and _chosen is not None and not getattr(_thread, "has_begun", False):
        _thread.has_begun = True
        if xp.cuda.runtime.getDevice() == 0:  # where CUDA lets every thread begin
            xp.cuda.Device(_chosen).use()
    return xp


def module_named(name: str) -> ModuleType:
    """`numpy` or `cupy`. Raises BackendError if there is no such backend or it cannot be used."""
    return default_module() if name == _backend else importlib.import_module(_usable(name))


def _known(name: str, kind: str, names: tuple[str, ...], source: str) -> str:
    if name not in names:
        raise BackendError(source + no_such(kind, name, names))
    return name


def _usable(name: str, source: str = "", device: int | None = None) -> str:
    global _chosen
    if _known(name, "backend", BACKENDS, source) == "cupy":
        number = _device() if device is None else device
        code, sentence = cupy_status(device=number)
        if code != "ok":
            raise BackendError(f"{source}the backend 'cupy' cannot be used here: {sentence}")
        if number is not None:
            _chosen, _thread.has_begun = number, True
    elif device is not None:
        raise BackendError(f"there is a device {device} on the backend 'cupy' alone, not on {name!r}")
    return name


def _device() -> int | None:
    given = os.environ.get("MINIGRAD_DEVICE")
    if given is not None and not given.isdecimal():
        raise BackendError(f"MINIGRAD_DEVICE: {given!r} is not the number of a GPU: 0, 1, …")
    return None if given is None else int(given)


def asarray(data: Any, dtype: Any = None) -> Array:
    """`data` as an array of the default backend: host data is copied to the device if that is CuPy.

    A device array stays on the device whatever the default is: bringing it back is `to_host`, never implied.
    No copy is made if none is needed.
    """
    if _is_device_array(data):
        return data if dtype is None else data.astype(dtype, copy=False)
    return default_module().asarray(data, dtype=dtype)


def to_host(x: Array) -> np.ndarray:
    """x as a NumPy array: itself if it is one, else a copy in C order, after waiting for the device."""
    return x.get() if array_module(x) is not np else np.asarray(x)


def move(x: Array, xp: Any) -> Array:
    """x as an array of the module xp, on the host or on the device: itself if it is one, else a copy in C order."""
    return x if array_module(x) is xp else to_host(x) if xp is np else xp.asarray(x)


def _is_device_array(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy" and hasattr(x, "get")


def capturing(xp: ModuleType) -> bool:
    """Whether a CUDA graph is being captured: what the GPU is given on this thread's stream is then recorded, not done.

    What is recorded must not wait, and must not bring anything from the host, which would be repeated as it was.
    """
    return xp is not np and bool(xp.cuda.get_current_stream().is_capturing())


class MemoryReport(NamedTuple):
    """Sizes in bytes. The pool is CuPy's default memory pool; None on the NumPy backend."""

    peak_resident: int  # the most memory the process has ever had on the host
    pool_used: int | None = None  # in arrays that are alive now
    pool_total: int | None = None  # taken from the device, used or kept for later
    device_total: int | None = None  # that the device has

    def __str__(self) -> str:
        if self.pool_used is None or self.pool_total is None or self.device_total is None:
            return f"at most {self.peak_resident / 1e9:.2f} GB of the host's memory were in use"
        kept = self.pool_total - self.pool_used
        return (
            f"of the GPU's {self.device_total / 1e9:.2f} GB, {self.pool_used / 1e9:.2f} GB are in arrays and "
            f"{kept / 1e9:.2f} GB kept for later ones"
        )


def memory_report() -> MemoryReport:
    """How much memory the process has used, on the host and on the device."""
    peak = _peak_resident()
    if backend() == "numpy":
        return MemoryReport(peak)
    xp: Any = default_module()
    pool = xp.get_default_memory_pool()
    return MemoryReport(peak, pool.used_bytes(), pool.total_bytes(), xp.cuda.runtime.memGetInfo()[1])


def _peak_resident() -> int:
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:  # Linux: ru_maxrss begins there at what the parent process had
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # here, because it exists on Unix only

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- Can CuPy be used here, and if not, what should the user do? ----

# Results of cudaGetDeviceCount. 35 is reported both without a driver and for one that is too old.
INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100


def cupy_status(smoke: bool = True, device: int | None = None) -> tuple[str, str]:
    """Whether CuPy can be used, as (code, sentence). Never raises. `device`, if given, becomes this thread's GPU.

        not_installed   the package is absent
        broken          the package is there but does not import
        no_driver       no NVIDIA driver (libcuda.so.1)
        old_driver      the driver does not know this CuPy's CUDA version
        no_device       no GPU, none is visible, or not the one that is wanted
        driver_error    the driver reports anything else
        no_libs         GPU and driver are fine, cuBLAS or NVRTC is missing: typical of a wheel without [ctk]
        failed          the smoke test failed in another way
        ok              ready

    `smoke` compiles a kernel, calls cuBLAS and reads a number back. Only this shows that the CUDA libraries are
    there; it creates the CUDA context (up to seconds, some hundred MB of device memory).
    """
    wheels = _cupy_wheels()
    try:
        code, sentence = _probe(wheels, smoke, device)
    except Exception as error:  # a diagnosis never raises
        code, sentence = "failed", f"probing CuPy failed with {first_line(error)}"
    if len(wheels) > 1:
        sentence += f"; several CuPy packages are installed ({', '.join(wheels)}): keep one"
    return code, sentence


def _probe(wheels: list[str], smoke: bool, device: int | None) -> tuple[str, str]:
    try:
        cupy: Any = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return "not_installed", (
                "CuPy is not installed: pip install 'cupy-cuda13x[ctk]' (NVIDIA driver 580 or newer), "
                "or 'cupy-cuda12x[ctk]' for an older driver"
            )
        return "broken", f"CuPy is installed but does not import, {first_line(error)}: reinstall it"
    except Exception as error:  # a damaged package can raise anything
        return "broken", f"CuPy is installed but does not import, {first_line(error)}: reinstall it"

    runtime = cupy.cuda.runtime
    driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return _driver_trouble(error, driver, needed)
    if devices == 0:
        return _no_device()
    if device is not None:
        if not 0 <= device < devices:
            there = "1 GPU, number 0" if devices == 1 else f"{devices} GPUs, 0 to {devices - 1}"
            return "no_device", f"there is no GPU {device} on this machine, which has {there}"
        cupy.cuda.Device(device).use()  # before the first product, which takes memory of the GPU it runs on

    if smoke:
        try:
            x = cupy.arange(4, dtype=cupy.float32).reshape(2, 2) + 1
            correct = float((x @ x)[1, 1]) == 22.0
        except Exception as error:
            if _names_a_missing_library(error):
                wheel = wheels[0] if wheels else "cupy-cuda13x"
                return "no_libs", f"a CUDA library is missing, {first_line(error)}: pip install '{wheel}[ctk]'"
            return "failed", f"a first product on the GPU failed with {first_line(error)}"
        if not correct:
            return "failed", "a 2×2 product on the GPU came back wrong: check the GPU with nvidia-smi"

    device = runtime.getDevice() if device is None else device  # the one that was tried
    gpu = runtime.getDeviceProperties(device)
    name = f"{gpu['name'].decode()}, sm_{gpu['major']}{gpu['minor']}"
    which = f"number {device}" if device else "the first"
    return "ok", f"{devices} device(s), {which} is {name}, the driver supports CUDA {_version(driver)}"


def _driver_trouble(error: Any, driver: int, needed: int) -> tuple[str, str]:
    """What a failed getDeviceCount means; `driver` and `needed` are CUDA versions, 12080 for 12.8."""
    if driver == 0:
        return "no_driver", "there is no NVIDIA driver on this machine (libcuda.so.1 not found): install it"
    if error.status == INSUFFICIENT_DRIVER:
        return "old_driver", (
            f"the NVIDIA driver supports CUDA {_version(driver)} but this CuPy needs {needed // 1000}.x: "
            f"update the driver, or install 'cupy-cuda{driver // 1000}x[ctk]' instead"
        )
    if error.status == NO_DEVICE:
        return _no_device()
    return "driver_error", f"the NVIDIA driver failed with {first_line(error)}: check it with nvidia-smi"


def _no_device() -> tuple[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return "no_device", "there is a driver but no GPU: check with nvidia-smi"
    return "no_device", f"no GPU is visible, CUDA_VISIBLE_DEVICES is {visible!r}: unset it or name a GPU that exists"


def _names_a_missing_library(error: Exception) -> bool:
    # cuBLAS missing is an ImportError, NVRTC missing a DynamicLibNotFoundError of the cuda.pathfinder package.
    by_type = isinstance(error, ImportError) or type(error).__name__ == "DynamicLibNotFoundError"
    return by_type or any(phrase in str(error) for phrase in ("Failed to find", "Failure finding", "not find"))


def first_line(error: Exception) -> str:
    """What an exception says, and its kind, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__} ({lines[0]})" if lines else type(error).__name__


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _cupy_wheels() -> list[str]:
    """Names of the installed distributions that provide CuPy: cupy, cupy-cuda12x, cupy-cuda13x, …"""
    names = {distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions()}
    return sorted(name for name in names if name.lower() == "cupy" or name.lower().startswith("cupy-"))
