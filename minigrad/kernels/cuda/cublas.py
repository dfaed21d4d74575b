"""Matrix products on the GPU, by NVIDIA's cuBLAS: called by ctypes in the library that CuPy has loaded.

CuPy's own products refuse to be recorded into a CUDA graph, copy operands whose rows are further apart than they are
long, and cannot add to what is there. Here a part of a wider matrix is read and written in place, and gradients of
several blocks of images are added up by the product itself.

cuBLAS stores matrices column by column. To it, a matrix of rows is the transpose of what it is to us, so it is asked
for outᵀ = bᵀ · aᵀ, which needs no copy: https://docs.nvidia.com/cuda/cublas/ has the meaning of every argument.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from ctypes import c_int, c_longlong, c_size_t, c_void_p
from typing import Any, NamedTuple

import numpy as np

from minigrad.backend import array_module, first_line, precision
from minigrad.errors import BackendError, ShapeError
from minigrad.layout import Array

WORKSPACE = 32 * 2**20  # bytes for cuBLAS to work in, what NVIDIA advises for an H100: given once, never asked for
LONGEST = 2**31 - 1  # sizes and distances are C's int

OPERAND = (c_void_p, c_int, c_int)  # address, type, distance of the columns
STACK = (*OPERAND, c_longlong)  # and of the matrices
SIZES = (c_void_p, c_int, c_int, c_int, c_int, c_int, c_void_p)  # handle, two transposes, m, n, k, alpha
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasCreate_v2": (ctypes.POINTER(c_void_p),),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasGemmEx": (*SIZES, *OPERAND, *OPERAND, c_void_p, *OPERAND, c_int, c_int),
    "cublasGemmStridedBatchedEx": (*SIZES, *STACK, *STACK, c_void_p, *STACK, c_int, c_int, c_int),
}
SUCCESS = 0
STATUSES = {
    1: "not initialised",
    3: "out of memory",
    7: "a wrong argument",
    8: "not for this GPU",
    11: "memory out of reach",
    13: "failed on the GPU",
    14: "an error inside cuBLAS",
    15: "not supported",
}
TYPES = {"f": 0, "d": 1}  # cudaDataType of what is stored: CUDA_R_32F, CUDA_R_64F
COMPUTE = {  # cublasComputeType_t, by what is stored and `minigrad.set_precision`
    ("f", "float32"): 68,  # CUBLAS_COMPUTE_32F
    ("f", "tf32"): 77,  # CUBLAS_COMPUTE_32F_FAST_TF32
    ("d", "float32"): 70,  # CUBLAS_COMPUTE_64F
    ("d", "tf32"): 70,
}
SCALARS: dict[str, Any] = {"f": ctypes.c_float, "d": ctypes.c_double}  # of alpha and beta, which lie on the host
ONE, ZERO = ({dtype: ctypes.byref(scalar(value)) for dtype, scalar in SCALARS.items()} for value in (1, 0))
ANY_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT


def product(a: Array, b: Array, out: Array, accumulate: bool = False) -> Array:
    """out = a @ b, or out += a @ b if `accumulate`.

    a, b, out   (m, k), (k, n), (m, n), or stacks (S, ·, ·) of them; a or b may be one matrix for the whole stack.
                Rows of `out` hold neighbours and may be further apart than they are long; so may those of a and b, or
                their columns; of what is neither, a copy is made
    Raises      ShapeError if sizes or dtypes do not fit together, BackendError if cuBLAS is missing or fails
    """
    xp, stream = array_module(out), array_module(out).cuda.get_current_stream().ptr
    call = planned(a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype, out.shape, out.strides, out.dtype)
    if call is None:
        if not accumulate:
            out[...] = 0
        return out
    if call.copies_a or call.copies_b:
        a, b = (xp.ascontiguousarray(x) if copied else x for x, copied in ((a, call.copies_a), (b, call.copies_b)))
        return product(a, b, out, accumulate)
    one, kept = ONE[call.dtype], (ONE if accumulate else ZERO)[call.dtype]
    if out.device.id != (device := xp.cuda.runtime.getDevice()):
        raise BackendError(
            f"a product on GPU {device} of arrays that lie on GPU {out.device.id}: every thread begins on GPU 0, let "
            f"this one call minigrad.set_backend('cupy', device={out.device.id})"
        )
    cublas, handle, _ = session(xp, device, threading.get_ident(), stream)
    status = getattr(cublas, call.function)(
        handle, *call.sizes, one, b.data.ptr, *call.of_b, a.data.ptr, *call.of_a, kept, out.data.ptr, *call.of_out,
        *call.stack, COMPUTE[call.dtype, precision()], ANY_ALGORITHM,
    )  # fmt: skip
    if status != SUCCESS:
        raise failure(f"{call.function} of {a.dtype} {a.shape} and {b.shape} in {precision()}", status)
    return out


class Call(NamedTuple):
    """What cuBLAS is asked for, but for where the operands are: the same for all that lie alike."""

    function: str
    dtype: str
    sizes: tuple[int, ...]  # whether the neighbours are in the columns of b, and of a; n, m, k
    of_b: tuple[int, ...]  # type, distance of the lines, in a stack of the matrices
    of_a: tuple[int, ...]
    of_out: tuple[int, ...]
    stack: tuple[int, ...]  # how many matrices
    copies_a: bool  # a must be copied first: then all this is not yet known
    copies_b: bool


Sizes = tuple[int, ...]


@functools.lru_cache(4096)
def planned(
    a: Sizes, a_strides: Sizes, a_dtype: np.dtype, b: Sizes, b_strides: Sizes, b_dtype: np.dtype,
    out: Sizes, out_strides: Sizes, out_dtype: np.dtype,
) -> Call | None:  # fmt: skip
    """The call for operands of these shapes, strides and dtypes; None where there is nothing to add up."""
    (m, k), n, dtype = a[-2:], b[-1], out_dtype.char
    stacks = {shape[:-2] for shape in (a, b, out) if len(shape) == 3}
    if (
        b[-2] != k or out[-2:] != (m, n) or len(stacks) > 1 or (len(out) == 2) == bool(stacks)
        or not dtype == a_dtype.char == b_dtype.char or dtype not in TYPES
    ):  # fmt: skip
        raise ShapeError(f"a product of {a_dtype} {a} and {b_dtype} {b} into {out_dtype} {out}")
    if 0 in (*out, k):
        return None
    size, stacked = out_dtype.itemsize, len(out) == 3
    of_b, of_a, of_out = (operand(*x, size, stacked) for x in ((b, b_strides), (a, a_strides), (out, out_strides)))
    if of_out is None or of_out[0]:
        raise ShapeError(f"a product cannot be written into {out} with strides {out_strides}")
    if of_a is None or of_b is None:
        return Call("", dtype, (), (), (), (), (), of_a is None, of_b is None)
    if max(m, n, k, of_a[1], of_b[1], of_out[1]) > LONGEST:
        raise ShapeError(f"a product of {a} and {b}: cuBLAS takes no more than {LONGEST} rows, or columns")
    function = "cublasGemmStridedBatchedEx" if stacked else "cublasGemmEx"
    sizes, kind = (of_b[0], of_a[0], n, m, k), TYPES[dtype]
    return Call(
        function, dtype, sizes, (kind, *of_b[1:]), (kind, *of_a[1:]), (kind, *of_out[1:]), out[:-2], False, False
    )


def operand(shape: Sizes, strides: Sizes, size: int, stacked: bool) -> tuple[int, ...] | None:
    """Whether its columns hold the neighbours, not its rows; how far the lines of neighbours lie apart, and in a stack
    how far the matrices do. None where it must be copied."""
    (rows, columns), (down, across) = shape[-2:], (stride // size for stride in strides[-2:])
    in_stack = (strides[0] // size if len(shape) == 3 else 0,) if stacked else ()
    if lines(rows, down, columns, across):
        return False, down if rows > 1 else columns, *in_stack
    if lines(columns, across, rows, down):
        return True, across, *in_stack
    return None


def lines(count: int, apart: int, length: int, step: int) -> bool:
    """Whether so many lines of neighbours do not overlap. The stride along an axis of one element says nothing."""
    return (step == 1 or length == 1) and (apart >= length or count == 1)


# ---- The library ----


@functools.cache
def session(xp: Any, device: int, thread: int, stream: int) -> tuple[Any, c_void_p, Array]:
    """cuBLAS, a handle for one stream of one device in one thread, and the memory it works in, which must stay.

    Products that run at once must not share this memory, so that no two streams or threads share a handle. With it
    given, nothing is allocated in a product, and its bits are the same in every run.
    """
    cublas, handle = library(xp), c_void_p()
    workspace = xp.empty(WORKSPACE, np.uint8)
    for function, *arguments in (
        ("cublasCreate_v2", ctypes.byref(handle)),
        ("cublasSetStream_v2", handle, stream),  # before the workspace: it would take that away again
        ("cublasSetWorkspace_v2", handle, workspace.data.ptr, WORKSPACE),
    ):
        if (status := getattr(cublas, function)(*arguments)) != SUCCESS:
            raise failure(function, status)
    return cublas, handle, workspace


@functools.cache
def library(xp: Any) -> Any:
    """cuBLAS with the types of what is called here, so that a wrong argument is refused by Python."""
    try:
        cublas = load(xp)
        for name, types in SIGNATURES.items():
            getattr(cublas, name).argtypes = types
    except (ImportError, OSError, AttributeError) as error:
        raise BackendError(
            f"cuBLAS, which multiplies matrices on the GPU, cannot be used, {first_line(error)}: "
            "install CuPy with its CUDA libraries, pip install 'cupy-cuda13x[ctk]' or 'cupy-cuda12x[ctk]'"
        ) from None
    return cublas


def load(xp: Any) -> Any:
    """The library itself, of CUDA's version that this CuPy is for: the one that CuPy has found and loaded."""
    _ = xp.cuda.cublas.create  # CuPy loads it when it is first looked at
    major = xp.cuda.runtime.runtimeGetVersion() // 1000
    return ctypes.CDLL(f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}")


def failure(what: str, status: int) -> BackendError:
    """What is raised for a status that is not SUCCESS."""
    hint = ": lower the batch size" if status == 3 else ""
    return BackendError(f"cuBLAS: {what} failed with status {status} ({STATUSES.get(status, 'unknown')}){hint}")
