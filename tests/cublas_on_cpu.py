"""cuBLAS on the CPU: the five functions that minigrad/kernels/cuda/cublas.py calls, over the host memory of fake_cupy.

They are C functions with the types of NVIDIA's cublas_api.h, so that a call goes through ctypes as on a GPU. What is
asked for is checked as cuBLAS checks it (sizes, distances, types), and beyond: an address must lie in an array that is
alive, the whole matrix too. Matrices are column-major, `beta` of 0 does not read the result, TF32 rounds its factors.
"""

from __future__ import annotations

import ctypes
import itertools
import types
from ctypes import CFUNCTYPE, POINTER, c_int, c_longlong, c_size_t, c_void_p
from typing import Any

import fake_graph
import numpy as np

CALLS: list[str] = []  # the names of the functions called, products with their compute type
SESSIONS: dict[int, types.SimpleNamespace] = {}  # handle -> stream, workspace
STORED = {0: np.dtype(np.float32), 1: np.dtype(np.float64)}  # by cudaDataType
COMPUTED = {68: (0, "float32"), 77: (0, "tf32"), 70: (1, "float64")}  # cublasComputeType_t -> what is stored, a name
OK, NOT_INITIALISED, WRONG, UNSUPPORTED = 0, 1, 7, 15

handles = itertools.count(1)


class Wrong(Exception):
    """Arguments that cuBLAS refuses with this status, or with which a GPU would touch memory that is not there."""

    def __init__(self, status: int):
        self.status = status


def matrices(
    address: int, dtype: np.dtype, rows: int, columns: int, ld: int, stride: int, count: int, writable: bool = False
) -> np.ndarray:
    """(count, rows, columns) as they lie: column by column, these `ld` apart, matrices `stride` apart."""
    if ld < max(1, rows) or (writable and count > 1 and abs(stride) < ld * (columns - 1) + rows):
        raise Wrong(WRONG)
    size = ((count - 1) * stride + (columns - 1) * ld + rows) * dtype.itemsize
    if not address or address % dtype.itemsize or fake_graph.around(address, size) is None:
        raise Wrong(WRONG)
    memory = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
    steps = (stride, 1, ld)
    return np.lib.stride_tricks.as_strided(
        memory, (count, rows, columns), [step * dtype.itemsize for step in steps], writeable=writable
    )


def as_tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to the ten bits of fraction that a tensor core reads."""
    return ((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def gemm(handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, a: Any, b: Any, beta: int, c: Any,
         count: int, compute_type: int, algorithm: int, name: str) -> int:  # fmt: skip
    """C = alpha · op(A) · op(B) + beta · C for each matrix of a stack; a, b, c: (address, type, ld, stride)."""
    if handle not in SESSIONS:
        return NOT_INITIALISED
    if min(m, n, k, count) < 1 or not {ta, tb} <= {0, 1}:  # cuBLAS takes 0 too: minigrad has no need to ask
        return WRONG
    if compute_type not in COMPUTED or {x[1] for x in (a, b, c)} != {COMPUTED[compute_type][0]} or algorithm != -1:
        return UNSUPPORTED
    dtype = STORED[c[1]]
    try:
        left = matrices(a[0], dtype, *((k, m) if ta else (m, k)), *a[2:], count)
        right = matrices(b[0], dtype, *((n, k) if tb else (k, n)), *b[2:], count)
        out = matrices(c[0], dtype, m, n, *c[2:], count, writable=True)
    except Wrong as wrong:
        return wrong.status
    left, right = left.swapaxes(1, 2) if ta else left, right.swapaxes(1, 2) if tb else right
    scalar = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    factor, kept = (dtype.type(scalar.from_address(at).value) for at in (alpha, beta))

    def compute(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
        if COMPUTED[compute_type][1] == "tf32":
            left, right = as_tf32(left), as_tf32(right)
        y = factor * (left @ right)
        out[...] = y + kept * out if kept else y

    if fake_graph.recording() and not fake_graph.capturing(SESSIONS[handle].stream):
        fake_graph.refuse("a product on another stream")
    fake_graph.do(name, compute, (left, right, out))
    CALLS.append(f"{name} {COMPUTED[compute_type][1]}")
    return OK


# ---- The functions, with the types of cublas_api.h; enumerations are int ----

OPERAND = (c_void_p, c_int, c_int)
STACK = (*OPERAND, c_longlong)


@CFUNCTYPE(c_int, POINTER(c_void_p))
def create(handle: Any) -> int:
    fake_graph.refuse("a cuBLAS handle is made")
    handle[0] = next(handles)
    SESSIONS[handle[0]] = types.SimpleNamespace(stream=0, workspace=None)
    CALLS.append("create")
    return OK


@CFUNCTYPE(c_int, c_void_p, c_void_p)
def set_stream(handle: int, stream: int | None) -> int:
    SESSIONS[handle] = types.SimpleNamespace(stream=stream, workspace=None)  # which takes the workspace away
    return OK


@CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
def set_workspace(handle: int, address: int, size: int) -> int:
    if fake_graph.around(address, size) is None:
        return WRONG
    SESSIONS[handle].workspace = (address, size)
    return OK


@CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p, *OPERAND, *OPERAND, c_void_p, *OPERAND,
           c_int, c_int)  # fmt: skip
def gemm_ex(handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, *rest: Any) -> int:
    a, b, beta, c, last = rest[:3], rest[3:6], rest[6], rest[7:10], rest[10:]
    return gemm(handle, ta, tb, m, n, k, alpha, (*a, 0), (*b, 0), beta, (*c, 0), 1, *last, "product")


@CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p, *STACK, *STACK, c_void_p, *STACK,
           c_int, c_int, c_int)  # fmt: skip
def gemm_strided_batched_ex(handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, *rest: Any) -> int:
    a, b, beta, c, last = rest[:4], rest[4:8], rest[8], rest[9:13], rest[13:]
    return gemm(handle, ta, tb, m, n, k, alpha, a, b, beta, c, *last, "stack of products")


library = types.SimpleNamespace(
    cublasCreate_v2=create,
    cublasSetStream_v2=set_stream,
    cublasSetWorkspace_v2=set_workspace,
    cublasGemmEx=gemm_ex,
    cublasGemmStridedBatchedEx=gemm_strided_batched_ex,
)
