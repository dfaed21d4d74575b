"""How a kernel is compiled: by Numba, to machine code that runs without the interpreter's lock.

A kernel is one function over C-contiguous arrays, with one version for each dtype. Floats keep IEEE's rules (no
fastmath): NaN and inf go through, and no sum is reordered.

Compiled code is kept on disk: in `__pycache__` beside the sources, or, where that cannot be written, in the user's
cache directory (NUMBA_CACHE_DIR names another); where neither can be written, every process compiles anew. What was
kept is valid for the sources of all kernels together, and for one NumPy. NUMBA_DISABLE_JIT=1 runs the same functions
as plain Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic
from tqdm import tqdm

from minigrad.layout import Array

_features = (config.CPU_FEATURES or llvm.get_host_cpu_features().flatten()).split(",")
VECTOR = 64 if "+avx512f" in _features else 32 if "+avx2" in _features else 16  # bytes of a register
LONG = 2.0  # seconds of compiling after which a line says so

_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
STAMP = hashlib.sha256(_sources + np.__version__.encode()).hexdigest()


class Cache(FunctionCache):
    """Numba's, but that code counts as old when any kernel's source has changed: kernels contain each other."""

    spent, told = 0.0, False
    compiling: Cache | None = None  # the kernel that is being compiled, with those that it calls

    def __init__(self, function: Callable[..., Any], name: str = ""):
        super().__init__(function)
        self._cache_file._source_stamp = STAMP
        self.name = name

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        # Numba's own key of a generated function differs from process to process: such a function has a name instead.
        return (signature, codegen.magic_tuple(), self.name) if self.name else super()._index_key(signature, codegen)

    def load_overload(self, signature: Any, target: Any) -> Any:
        found = super().load_overload(signature, target)
        if found is None and Cache.compiling is None:
            Cache.compiling, self.begun = self, time.perf_counter()
            if Cache.spent > LONG and not Cache.told:
                Cache.told = True
                tqdm.write(  # above a progress bar
                    "minigrad compiles its kernels for this machine: up to a minute for the first training step, once "
                    f"(they are kept in {self.cache_path})",
                    file=sys.stderr,
                )
        return found

    def save_overload(self, signature: Any, data: Any) -> None:
        super().save_overload(signature, data)
        if Cache.compiling is self:
            Cache.compiling = None
            Cache.spent += time.perf_counter() - self.begun


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: the function as machine code."""
    kernel = njit(nogil=True, error_model="numpy")(function)
    if not config.DISABLE_JIT:
        with contextlib.suppress(RuntimeError):  # no directory can be written
            kernel._cache = Cache(function)
    return kernel


_kept: list[CFunc] = []  # functions that compiled code calls by address must stay alive


def exported(name: str, signature: Any, function: Callable[..., None]) -> Any:
    """The function compiled once, for kernels that call it by name in place of containing it: they compile faster."""
    exported_function: Any = CFunc(
        function, (signature.args, signature.return_type), {}, {"nopython": True, "error_model": "numpy"}
    )
    with contextlib.suppress(RuntimeError):  # no directory can be written
        exported_function._cache = Cache(function, name)
    exported_function.compile()
    _kept.append(exported_function)
    llvm.add_symbol(name, exported_function.address)
    return types.ExternalFunction(name, signature)


@intrinsic
def _fetch_and_add(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value in one step that no other thread can cut in two; returns the number before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> ir.Value:
        cells = context.make_array(signature.args[0])(context, builder, arguments[0])
        cell = cgutils.gep(builder, cells.data, arguments[1])
        return builder.atomic_rmw("add", cell, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


def _in_two(array: Array, index: int, value: int) -> int:
    array[index] += value
    return int(array[index]) - value


_add = _in_two if config.DISABLE_JIT else _fetch_and_add


@compiled
def fetch_and_add(array: Array, index: int, value: int) -> int:
    """array[index] += value, atomically; returns the number before."""
    return _add(array, index, value)


@compiled
def take(turn: Array) -> int:
    """The number of the next block that no thread has taken, or −1. turn: blocks taken, blocks in all."""
    block = fetch_and_add(turn, 0, 1)
    return block if block < turn[1] else -1


@intrinsic
def _move(context: Any, target: Any, source: Any) -> Any:
    """Copy the VECTOR bytes at one address to another."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> ir.Value:
        vector = ir.VectorType(ir.IntType(8), VECTOR).as_pointer()
        to, start = (builder.inttoptr(address, vector) for address in arguments)
        builder.store(builder.load(start, align=1), to, align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


def _copy_run(source: Array, start: int, target: Array, at: int, count: int) -> None:
    """Copy a few values from source[start:] to target[at:], in whole vectors: up to a vector more than `count`.

    A loop over a few values is several times slower.
    """
    size = source.itemsize
    x, y = source.ctypes.data + start * size, target.ctypes.data + at * size
    for byte in range(0, count * size, VECTOR):
        _move(y + byte, x + byte)


def _plain_copy_run(source: Array, start: int, target: Array, at: int, count: int) -> None:
    target[at : at + count] = source[start : start + count]


copy_run = _plain_copy_run if config.DISABLE_JIT else compiled(_copy_run)
