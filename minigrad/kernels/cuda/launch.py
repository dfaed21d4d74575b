"""How CUDA kernels are compiled and launched.

CuPy compiles a kernel's source when it is first called, for the dtype at hand, and keeps the result on disk. Every
kernel computes a matrix: its operands are pixel matrices whose rows may be further apart than they are long, so that
some columns of a wider matrix, such as a part of a concatenation, are read in place.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minigrad.backend import array_module, first_line, module_named
from minigrad.errors import BackendError, ShapeError
from minigrad.kernels.cuda.cublas import library
from minigrad.layout import Array, Window, pixels

THREADS = 256  # of a block
BLOCKS = 4096  # about as many blocks share the rows of a matrix: a few times what a GPU holds at once
INT = 2**30  # longer arrays are indexed by 64-bit integers, whose divisions are slow
GRID_Y = 65535  # the most blocks side by side


def check_usable() -> None:
    """Raise BackendError if CuPy is missing, or if CUDA kernels cannot be compiled or cuBLAS not be called."""
    xp: Any = sys.modules.get("cupy") or module_named("cupy")
    if xp.cuda.runtime.is_hip:
        raise BackendError("this CuPy is for AMD's ROCm, and the CUDA kernels are for NVIDIA's GPUs")
    try:
        module(xp, "dense", "f", "i", 1).get_function("add_bias")
    except Exception as error:
        raise BackendError(f"CUDA kernels cannot be compiled, {first_line(error)}") from None
    library(xp)


@functools.cache
def module(xp: Any, source: str, dtype: str, index: str, values: int) -> Any:
    """The kernels of `source`.cu for one dtype, one index type and one number of values in a Pack."""
    return xp.RawModule(code=cuda_source(dtype, index, values, source), options=("--std=c++17",))


def cuda_source(dtype: str, index: str, values: int, *sources: str) -> str:
    """What is compiled: the choices that common.h names, common.h, and the sources. Types are NumPy's characters."""
    types = {"f": "float", "d": "double", "i": "int", "q": "long long"}
    choices = f"typedef {types[dtype]} T;\ntypedef {types[index]} Index;\n"
    choices += f"constexpr int V = {values}, THREADS = {THREADS};\n"
    parts = [choices]
    for name in ("common.h", *(f"{source}.cu" for source in sources)):
        parts.append(f'#line 1 "{name}"\n' + Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return "".join(parts)


def block_shape(columns: int) -> tuple[int, int]:
    """A block's threads across the columns and down the rows: many neighbours where no more than an eighth of the
    threads is idle, few idle ones elsewhere; powers of two."""
    if columns < 8:
        across = 1 << (columns - 1).bit_length()
    else:
        across = min((32, 16, 8), key=lambda width: max(1.125 * columns, -(-columns // width) * width))
    return across, THREADS // across


@functools.lru_cache(4096)
def plan(
    xp: Any, source: str, kernel: str, dtype: str, index: str, rows: int, columns: int, values: int, parts: int | None
) -> tuple[Any, tuple[int, int], tuple[int, int]]:
    """The kernel, the blocks down the rows and across the columns, and the threads of a block across and down."""
    width = columns // values
    across, down = block_shape(min(4, width) if rows == parts == 1 else width)  # a single row: a total of many parts
    beside = -(-width // across)
    if beside > GRID_Y:
        raise ShapeError(
            f"{kernel} got a matrix of {columns} columns, the GPU's grid ends at {GRID_Y * across * values}"
        )
    if parts is None:
        parts = max(1, min(-(-rows // down), BLOCKS // beside))
    function = module(xp, source, dtype, index, values).get_function(kernel)
    return function, (parts, beside), (across, down)


def launch(
    source: str,
    kernel: str,
    like: Array,
    rows: int,
    columns: int,
    *args: Any,
    values: int = 1,
    parts: int | None = None,
) -> None:
    """Start a kernel on a matrix of this size, for the dtype of `like`.

    values   in a Pack: so many columns belong to one thread
    parts    how many blocks share the rows; as many as keep the GPU busy unless given

    Integers and bools, Python's or NumPy's, become the kernel's Index, Python's floats are double already; anything
    else would reach the kernel as wrong bits, without an error. Raises ShapeError if the matrix has too many columns.
    """
    given, integers, longest = list(args), [], 0
    for i, a in enumerate(args):
        if isinstance(a, (int, np.integer, np.bool_)):
            integers.append(i)
        elif not isinstance(a, float):
            longest = max(longest, a.shape[0] * abs(a.strides[0]) // a.itemsize)
    index, integer = ("i", np.int32) if longest < INT else ("q", np.int64)
    for i in integers:
        given[i] = integer(given[i])
    function, grid, block = plan(
        array_module(like), source, kernel, like.dtype.char, index, rows, columns, values, parts
    )
    function(grid, block, tuple(given))


def matrix(x: Array) -> tuple[Array, int]:
    """The pixel matrix of images, and how many values lie between the starts of its rows.

    A view where the channels of a pixel are neighbours, as in any columns of a pixel matrix.
    """
    rows = pixels(x)
    (down, across), itemsize = rows.strides, rows.itemsize
    if (across != itemsize and rows.shape[1] > 1) or down % itemsize:
        rows = array_module(x).ascontiguousarray(rows)
        down = rows.strides[0]
    return rows, rows.shape[1] if len(rows) == 1 else down // itemsize


def empty_matrix(x: Array) -> Array:
    """Room for a pixel matrix of the size of x."""
    n, c, h, w = x.shape
    return array_module(x).empty((n * h * w, c), x.dtype)


def pack(*matrices: Array) -> int:
    """How many values a thread can move at once: 16 bytes if the rows of all these matrices start at such borders."""
    values = 16 // matrices[0].itemsize
    fits = all(
        m.data.ptr % 16 == 0 and m.shape[1] % values == 0 and (len(m) == 1 or m.strides[0] % 16 == 0) for m in matrices
    )
    return values if fits else 1


def side_by_side(xs: list[Array]) -> list[tuple[Array, slice]]:
    """Images with the channels that are theirs in the concatenation of all."""
    ends = itertools.accumulate(x.shape[1] for x in xs)
    return [(x, slice(end - x.shape[1], end)) for x, end in zip(xs, ends, strict=True)]


def part(x: Array, own: slice) -> Array:
    """Some columns, or all of them without the time that a view takes."""
    return x if own.stop - own.start == x.shape[-1] else x[..., own]


@functools.lru_cache(4096)
def fields(window: Window) -> tuple[int, ...]:
    """A window as the kernels take it."""
    return tuple(itertools.chain.from_iterable(window))
