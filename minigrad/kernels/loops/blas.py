"""Matrix products from inside compiled loops, by the OpenBLAS that NumPy has loaded, on one thread.

Compiled code names the functions that it calls, and the names are bound here to the addresses in this process. Where
NumPy has another BLAS, they are bound to Python functions that call np.matmul.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import config, types
from threadpoolctl import threadpool_info

from minigrad.kernels.loops.compiled import compiled, fetch_and_add
from minigrad.layout import Array

# OpenBLAS multiplies up to so many multiply-adds without first packing the operands. Where the second one is small, a
# stack of such products is up to 1.6 times as fast as one tall product.
UNPACKED = 1_000_000
PIECE = 64  # rows that such a product should have at least

REAL = {"s": (ctypes.c_float, types.float32, np.float32), "d": (ctypes.c_double, types.float64, np.float64)}
_kept: list[Any] = []  # what is called by address must stay alive


def _openblas(name: str) -> Any:
    """A function of NumPy's OpenBLAS whose integers have 64 bits, or None."""
    for library in threadpool_info():
        if library["internal_api"] == "openblas":
            found = ctypes.CDLL(library["filepath"])
            for spelling in (f"scipy_{name}64_", f"{name}64_"):
                if hasattr(found, spelling):
                    return getattr(found, spelling)
    return None


def _by_numpy(real: type) -> Callable[..., None]:
    """cblas_sgemm or dgemm for matrices that lie row by row (order 101), as np.matmul."""

    def matrix(address: int, rows: int, columns: int, step: int) -> Array:
        span = ((rows - 1) * step + columns) * np.dtype(real).itemsize
        cells: Any = (ctypes.c_char * span).from_address(address)
        return np.ndarray((rows, columns), real, cells, 0, (step * np.dtype(real).itemsize, np.dtype(real).itemsize))

    def gemm(_: int, ta: int, tb: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
             beta: float, c: int, ldc: int) -> None:  # fmt: skip
        if not m or not n:
            return
        left = matrix(a, k, m, lda).T if ta == 112 else matrix(a, m, k, lda)
        right = matrix(b, n, k, ldb).T if tb == 112 else matrix(b, k, n, ldb)
        out = matrix(c, m, n, ldc)
        out[...] = left @ right + (beta * out if beta else 0)

    return gemm


def _bind(name: str, function: Any, result: Any, *arguments: Any) -> None:
    """Let compiled code find a C function, or a Python function as one, under a name."""
    if isinstance(function, FunctionType):
        function = ctypes.CFUNCTYPE(result, *arguments)(function)
    _kept.append(function)
    llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


def _external(letter: str) -> Any:
    """cblas_sgemm or cblas_dgemm, for compiled code."""
    real_c, real, real_np = REAL[letter]
    size, address, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    found = _openblas(f"cblas_{letter}gemm") or _by_numpy(real_np)
    operands = (address, size, address, size, real_c, address, size)
    _bind(f"minigrad_{letter}gemm", found, None, flag, flag, flag, size, size, size, real_c, *operands)
    places = (types.uintp, types.int64, types.uintp, types.int64, real, types.uintp, types.int64)
    return types.ExternalFunction(
        f"minigrad_{letter}gemm", types.void(*[types.int32] * 3, *[types.int64] * 3, real, *places)
    )


sgemm, dgemm = _external("s"), _external("d")
_bind("minigrad_blas_threads", _openblas("openblas_get_num_threads") or (lambda: 1), ctypes.c_int32)
_bind("minigrad_set_blas_threads", _openblas("openblas_set_num_threads") or (lambda n: None), None, ctypes.c_int32)
blas_threads = types.ExternalFunction("minigrad_blas_threads", types.int32())
set_blas_threads = types.ExternalFunction("minigrad_set_blas_threads", types.void(types.int32))


def _gemm(a: Array, at: bool, b: Array, bt: bool, beta: float, out: Array, k: int) -> None:
    """out = a · b + beta · out, of a or aᵀ and b or bᵀ; k is their inner length, rows may be longer."""
    m, n = out.shape
    ta, tb = 112 if at else 111, 112 if bt else 111
    lda, ldb, ldc = a.strides[0] // a.itemsize, b.strides[0] // a.itemsize, out.strides[0] // a.itemsize
    if a.itemsize == 4:
        sgemm(101, ta, tb, m, n, k, 1.0, a.ctypes.data, lda, b.ctypes.data, ldb, beta, out.ctypes.data, ldc)
    else:
        dgemm(101, ta, tb, m, n, k, 1.0, a.ctypes.data, lda, b.ctypes.data, ldb, beta, out.ctypes.data, ldc)


def _plain_gemm(a: Array, at: bool, b: Array, bt: bool, beta: float, out: Array, k: int) -> None:
    """The same under the plain interpreter."""
    m, n = out.shape
    left = a[:k, :m].T if at else a[:m, :k]
    right = b[:n, :k].T if bt else b[:k, :n]
    out[...] = left @ right + (beta * out if beta else 0)


gemm = _plain_gemm if config.DISABLE_JIT else compiled(_gemm)


@compiled
def product(a: Array, b: Array, out: Array, k: int) -> None:
    """out = a · b for a tall a: in pieces that are not packed, where b is small."""
    m, n = out.shape
    piece = UNPACKED // (k * n)
    if piece < PIECE:
        piece = m
    for first in range(0, m, piece):
        last = min(first + piece, m)
        gemm(a[first:last], False, b, False, 0.0, out[first:last], k)


@compiled
def add_product_of_transposed(a: Array, b: Array, beta: float, out: Array, rows: int) -> None:
    """out = aᵀ · b + beta · out, for tall a and b of so many rows."""
    k, n = out.shape
    piece = UNPACKED // (k * n)
    if piece < PIECE:
        piece = rows
    for first in range(0, rows, piece):
        last = min(first + piece, rows)
        gemm(a[first:last], True, b[first:last], False, beta if first == 0 else 1.0, out, last - first)


# --- BLAS on one thread

# A lock, how many kernels want BLAS on one thread, and how many threads it had before. Compiled code alone changes
# these, and no KeyboardInterrupt comes between its lines: BLAS gets its threads back.
holders = np.zeros(3, np.int64)


def _hold(holders: Array) -> None:
    """Put BLAS on one thread, until every kernel that holds it has let go."""
    while fetch_and_add(holders, 0, 1) != 0:
        fetch_and_add(holders, 0, -1)
    if holders[1] == 0:
        holders[2] = blas_threads()
        set_blas_threads(1)
    holders[1] += 1
    fetch_and_add(holders, 0, -1)


def _let_go(holders: Array) -> None:
    while fetch_and_add(holders, 0, 1) != 0:
        fetch_and_add(holders, 0, -1)
    holders[1] -= 1
    if holders[1] == 0:
        set_blas_threads(holders[2])
    fetch_and_add(holders, 0, -1)


def _nothing(holders: Array) -> None:
    """Under the plain interpreter."""


hold, let_go = (_nothing, _nothing) if config.DISABLE_JIT else (compiled(_hold), compiled(_let_go))


@compiled
def forget(holders: Array) -> None:
    """In a forked child: nobody holds BLAS, whoever held it in the parent."""
    if holders[1] > 0:
        set_blas_threads(holders[2])
    holders[:] = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: forget(holders))
