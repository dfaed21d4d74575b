"""CUDA kernels on the CPU: their own source, compiled by a C++ compiler, run over NumPy's memory.

Where CuPy would hand wrong bits to a kernel without a word (a Python integer as 64 bits, a float64 array for `float*`,
values that are no neighbours), `run` refuses the call.
What it cannot show: races between blocks, the GPU's rounding, speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
CACHE = HERE / "__pycache__"  # compiled code, by the hash of its source
SCALARS = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float64": ctypes.c_double}

REVERSED = False  # run threads and blocks last to first


@functools.cache
def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library(code: str) -> ctypes.CDLL:
    """The kernels of a CUDA source as functions; the test that asks is skipped where there is no compiler."""
    if compiler() is None:
        pytest.skip("no C++ compiler (c++, g++ or clang++), which runs CUDA kernels on the CPU")
    kernels = re.findall(r'^(?:KERNEL|extern "C" __global__ void) (\w+)\(', code, re.MULTILINE)
    exports = "".join(f"EXPORT({kernel})\n" for kernel in kernels)
    header = (HERE / "cuda_on_cpu.h").read_text()
    source = f"{header}\n{code}\n{exports}"
    binary = CACHE / f"cuda_{hashlib.sha256(source.encode()).hexdigest()[:24]}.so"
    if not binary.exists():
        CACHE.mkdir(exist_ok=True)
        fresh = binary.with_suffix(f".{os.getpid()}")
        # hidden: otherwise what is `static` in a template is one for all libraries of the process
        options = ["-x", "c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
        subprocess.run([compiler(), *options, "-w", "-o", fresh, "-"], input=source.encode(), check=True)  # type: ignore[list-item]
        os.replace(fresh, binary)
    return ctypes.CDLL(str(binary))


def run(code: str, kernel: str, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
    """Run a kernel on NumPy arrays; TypeError for an argument that is not exactly what the source declares."""
    functions = library(code)
    parameters = functions[f"{kernel}_parameters"]
    parameters.restype = ctypes.c_char_p
    names = parameters().decode().split(",")[:-1]
    if len(args) != len(names):
        raise TypeError(f"{kernel} takes {len(names)} arguments, got {len(args)}")
    if not 1 <= np.prod(block) <= 1024 or min(*grid, *block) < 1 or max(grid[1:], default=1) > 65535:
        raise ValueError(f"{kernel}: a GPU refuses the grid {grid} of blocks {block}")
    values: list[Any] = []
    for number, (name, arg) in enumerate(zip(names, args, strict=True)):
        is_array = isinstance(arg, np.ndarray)
        given = f"{arg.dtype} array" if is_array else "float64" if type(arg) is float else type(arg).__name__
        if given != name:
            raise TypeError(f"{kernel}: argument {number} is {name} in the source, got {given}")
        if is_array and arg.shape[-1:] > (1,) and arg.strides[-1] != arg.itemsize:
            raise ValueError(f"{kernel}: argument {number} has strides {arg.strides}, a kernel takes neighbours")
        values.append(ctypes.c_void_p(arg.ctypes.data) if is_array else SCALARS[name](arg))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    shapes = [(ctypes.c_uint * 2)(*shape) for shape in (grid, block)]
    if functions[f"{kernel}_run"](pointers, *shapes, int(REVERSED)):
        raise RuntimeError(f"{kernel}: some threads of a block end while others wait at __syncthreads")
