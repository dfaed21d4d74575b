"""Matrix products in registers: what BLAS would do, for the shapes that convolutions have.

A tile of the product, some rows by a few vectors of columns, stays in the registers of a core while the inner index k
runs. Each step loads a row of b, broadcasts one number of a for each row of the tile, and multiplies and adds:

    for k:  for i, j of the tile:  sums[i, j] += a[i, k] · b[k, j]

Goto, van de Geijn: Anatomy of high-performance matrix multiplication, 2008; here without a copy of a, which a
convolution has just written into the cache. Each element of the product is one sum in the order of k, whatever rows
are computed together: results do not depend on how the rows are cut into blocks.

On products of few columns, which convolutions often are, this takes 0.67 to 0.85 of OpenBLAS's time, on wide ones the
same (measured on an Intel Xeon with AVX-512).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from minigrad.kernels.loops.blocks import LANES, spread
from minigrad.kernels.loops.compiled import VECTOR, compiled, exported, take
from minigrad.layout import Array, empty

# Rows of a tile by the vectors of columns it has: the tile, a row of b and a number of a fill the registers.
ROWS = {2: 6, 1: 12} if VECTOR == 32 else {4: 6, 3: 8, 2: 12, 1: 14}
WIDEST = max(ROWS)
A_BYTES = 1 << 18  # of a, multiplied with one panel of b after the other: a part of the second cache
PIECE = 64  # rows of b that stay in the first cache while all columns of a meet them, in a transposed product


def _tile(real: Any, rows: int, vectors: int, lanes: int) -> Callable[..., None]:
    """An intrinsic for compiled code: a tile of the product, of rows × vectors·lanes elements.

    a, b, c            addresses
    a_row, a_k         elements from a row of the tile to the next one, and from k to k + 1
    b_k, c_row         elements from k to k + 1, and from a row of the tile to the next one
    length, add        how far k runs; whether to add to c
    columns            how many columns to write: the tile may be wider than what is left of c
    """
    number, step, bytes_ = (
        ir.FloatType() if real == types.float32 else ir.DoubleType(),
        ir.IntType(64),
        real.bitwidth // 8,
    )
    vector = ir.VectorType(number, lanes) if lanes > 1 else number
    name = f"llvm.fmuladd.{f'v{lanes}' * (lanes > 1)}f{real.bitwidth}"
    zero = ir.Constant(vector, [0.0] * lanes if lanes > 1 else 0.0)

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        a, a_row, a_k, b, b_k, c, c_row, length, add, columns = arguments
        multiply_add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        a, b, c = (builder.inttoptr(address, number.as_pointer()) for address in (a, b, c))

        def at(start: Any, elements: Any) -> Any:
            return builder.bitcast(builder.gep(start, [elements]), vector.as_pointer())

        def broadcast(value: Any) -> Any:
            if lanes == 1:
                return value
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None))

        cells = [(i, j) for i in range(rows) for j in range(vectors)]
        before, head, body, after = builder.block, *(builder.append_basic_block() for _ in range(3))
        starts = [
            step(0),
            b,
            *(builder.gep(a, [builder.mul(a_row, step(i))]) for i in range(rows)),
            *[zero] * len(cells),
        ]
        builder.branch(head)
        builder.position_at_end(head)
        running = [builder.phi(value.type) for value in starts]
        k, row, numbers, sums = running[0], running[1], running[2 : 2 + rows], running[2 + rows :]
        builder.cbranch(builder.icmp_signed("<", k, length), body, after)
        builder.position_at_end(body)
        b_row = [builder.load(at(row, step(j * lanes)), align=bytes_) for j in range(vectors)]
        a_column = [broadcast(builder.load(place)) for place in numbers]
        totals = [builder.call(multiply_add, [a_column[i], b_row[j], s]) for (i, j), s in zip(cells, sums, strict=True)]
        nexts = [builder.add(k, step(1)), builder.gep(row, [b_k]), *(builder.gep(p, [a_k]) for p in numbers), *totals]
        builder.branch(head)
        for phi, value, following in zip(running, starts, nexts, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(following, body)
        builder.position_at_end(after)
        with builder.if_else(builder.icmp_signed("==", columns, step(vectors * lanes))) as (all_columns, some_columns):
            with all_columns:
                places = [at(c, builder.add(builder.mul(c_row, step(i)), step(j * lanes))) for i, j in cells]
                with builder.if_else(add) as (adding, setting):
                    with adding:
                        for place, total in zip(places, sums, strict=True):
                            more = builder.fadd(builder.load(place, align=bytes_), total)
                            builder.store(more, place, align=bytes_)
                    with setting:
                        for place, total in zip(places, sums, strict=True):
                            builder.store(total, place, align=bytes_)
            with some_columns:
                own = cgutils.alloca_once(builder, ir.ArrayType(vector, len(cells)))
                for number_, total in enumerate(sums):
                    builder.store(total, builder.gep(own, [step(0), step(number_)]))
                numbers_ = builder.bitcast(own, number.as_pointer())
                with cgutils.for_range(builder, step(rows)) as row_, cgutils.for_range(builder, columns) as column:
                    source = builder.add(builder.mul(row_.index, step(vectors * lanes)), column.index)
                    place = builder.gep(c, [builder.add(builder.mul(row_.index, c_row), column.index)])
                    total = builder.load(builder.gep(numbers_, [source]))
                    more = builder.fadd(builder.load(place), total)
                    builder.store(builder.select(add, more, total), place)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        context: Any, a: Any, a_row: Any, a_k: Any, b: Any, b_k: Any, c: Any, c_row: Any, length: Any, add: Any,
        columns: Any,
    ) -> Any:  # fmt: skip
        return types.void(*[types.intp] * 8, types.boolean, types.intp), emit

    return tile


def _panel(real: Any, vectors: int, lanes: int, rows: int) -> Callable[..., None]:
    """A panel of so many columns, at most vectors · lanes, all rows of it: tiles below each other, then single rows."""
    tile, single = _tile(real, rows, vectors, lanes), _tile(real, 1, vectors, lanes)
    size = real.bitwidth // 8

    @compiled
    def panel(a, a_row, a_k, b, b_k, c, c_row, m, length, add, columns):
        i = 0
        while i < m:
            if i + rows > m and m >= rows and not add:
                i = m - rows  # the last tile computes some rows a second time
            if i + rows <= m:
                tile(a + i * a_row * size, a_row, a_k, b, b_k, c + i * c_row * size, c_row, length, add, columns)
                i += rows
            else:
                single(a + i * a_row * size, a_row, a_k, b, b_k, c + i * c_row * size, c_row, length, add, columns)
                i += 1

    return panel


def _multiply(real: Any) -> Any:
    """For one dtype: c = a · b, or c += a · b, of addresses; distances in elements.

    b_k   from a row of b to the next one; 0: b is packed
    """
    lanes, size = VECTOR * 8 // real.bitwidth, real.bitwidth // 8
    by_vectors = {vectors: _panel(real, vectors, lanes, rows) for vectors, rows in ROWS.items()}
    four, three, two, one = (by_vectors.get(vectors, by_vectors[2]) for vectors in (4, 3, 2, 1))

    def multiply(a, a_row, a_k, b, b_k, c, c_row, m, n, length, add):
        j = 0
        while j < n:
            wide = width(n - j, size)
            columns, z = min(wide, n - j), c + j * size
            y, step = (b + j * size, b_k) if b_k else (b + j * length * size, wide)
            if wide == 4 * lanes:
                four(a, a_row, a_k, y, step, z, c_row, m, length, add, columns)
            elif wide == 3 * lanes:
                three(a, a_row, a_k, y, step, z, c_row, m, length, add, columns)
            elif wide == 2 * lanes:
                two(a, a_row, a_k, y, step, z, c_row, m, length, add, columns)
            else:
                one(a, a_row, a_k, y, step, z, c_row, m, length, add, columns)
            j += wide

    return exported(f"minigrad_multiply_{size}", types.void(*[types.intp] * 10, types.boolean), multiply)


@compiled
def width(n, itemsize):
    """How many columns the first panel of n columns has; zeros fill up the last one."""
    lanes = VECTOR // itemsize
    vectors = -(-n // lanes)
    return lanes * min(3 if vectors == 5 else vectors, WIDEST)  # three and two are faster than four and one


if not config.DISABLE_JIT:
    _multiply_4, _multiply_8 = _multiply(types.float32), _multiply(types.float64)


@compiled
def put_row(row, k, length, columns, panels):
    """Row k of b (length, N) to its places in the panels; no panel reaches over a multiple of `columns`."""
    n, j = len(row), 0
    while j < n:
        stop = min(n, j // columns * columns + columns)
        wide = width(stop - j, panels.itemsize)
        source, target = row[j:], panels[j * length + k * wide :]
        for q in range(min(wide, stop - j)):
            target[q] = source[q]
        j += wide


def padded(n: int, itemsize: int) -> int:
    """Columns of all panels of n columns together."""
    lanes = VECTOR // itemsize
    return -(-n // lanes) * lanes


@compiled
def _pack(turn, b, columns, step, panels):
    block = take(turn)
    while block >= 0:
        for k in range(block * step, min(block * step + step, len(b))):
            put_row(b[k], k, len(b), columns, panels)
        block = take(turn)


@compiled
def _pack_transposed(turn, b, columns, step, panels):
    n, length = b.shape
    block = take(turn)
    while block >= 0:
        first, last, j = block * step, min(block * step + step, length), 0
        while j < n:
            stop = min(n, j // columns * columns + columns)
            wide = width(stop - j, panels.itemsize)
            for k in range(first, last):
                target = panels[j * length + k * wide :]
                for q in range(min(wide, stop - j)):
                    target[q] = b[j + q, k]
            j += wide
        block = take(turn)


def packed(b: Array, transposed: bool = False, columns: int = 0) -> Array:
    """b (K, N), or the transpose of b (N, K), as `product` reads it: panels of columns one after the other, in each its
    K rows.

    columns   where N is cut, a whole number of vectors: columns j … are [j·K:] of the result
    """
    length, n = b.shape[::-1] if transposed else b.shape
    panels = empty(np, (padded(n, b.itemsize) * length,), b.dtype)
    if panels.size > b.size:
        panels[:] = 0
    step = -(-length // max(1, min(LANES, b.size >> 15)))
    spread(_pack_transposed if transposed else _pack, -(-length // step), b, columns or n, step, panels)
    return panels


def _product(a: Array, panels: Array, out: Array, length: int) -> None:
    """out = a · b.

    a       (M, P): its first `length` columns
    panels  from `packed`
    out     (M, N): a part of wider rows, or whole rows
    """
    (m, n), size = out.shape, out.itemsize
    x, y, z = a.ctypes.data, panels.ctypes.data, out.ctypes.data
    chunk = max(48, A_BYTES // (size * length) // 24 * 24)
    for i in range(0, m, chunk):
        rows, left, target = min(chunk, m - i), x + i * a.strides[0], z + i * out.strides[0]
        if size == 4:
            _multiply_4(left, a.strides[0] // 4, 1, y, 0, target, out.strides[0] // 4, rows, n, length, False)
        else:
            _multiply_8(left, a.strides[0] // 8, 1, y, 0, target, out.strides[0] // 8, rows, n, length, False)


def _product_of_transposed(a: Array, b: Array, out: Array, add: bool) -> None:
    """out = aᵀ · b, or out += aᵀ · b if `add`.

    a   (K, ≥ M): its first M columns
    b   (K, ≥ N): its first N columns
    out (M, N)
    """
    (m, n), size, k, lanes = out.shape, out.itemsize, len(a), VECTOR // out.itemsize
    whole = n - n % lanes  # columns that fill vectors; the others are copied, so that no vector reaches beyond b
    rest = np.zeros((PIECE, lanes), out.dtype)
    for start in range(0, k, PIECE):
        length, more = min(PIECE, k - start), add or start > 0
        x, y, z = a.ctypes.data + start * a.strides[0], b.ctypes.data + start * b.strides[0], out.ctypes.data
        for i in range(length if whole < n else 0):
            source, target = b[start + i, whole:], rest[i]
            for q in range(n - whole):
                target[q] = source[q]
        y_rest, z_rest = rest.ctypes.data, z + whole * size
        if size == 4:
            a_k, b_k, row = a.strides[0] // 4, b.strides[0] // 4, out.strides[0] // 4
            _multiply_4(x, 1, a_k, y, b_k, z, row, m, whole, length, more)
            _multiply_4(x, 1, a_k, y_rest, lanes, z_rest, row, m, n - whole, length, more)
        else:
            a_k, b_k, row = a.strides[0] // 8, b.strides[0] // 8, out.strides[0] // 8
            _multiply_8(x, 1, a_k, y, b_k, z, row, m, whole, length, more)
            _multiply_8(x, 1, a_k, y_rest, lanes, z_rest, row, m, n - whole, length, more)


def _plain_product(a: Array, panels: Array, out: Array, length: int) -> None:
    """`product` under the plain interpreter."""
    n, j = out.shape[1], 0
    while j < n:
        wide = width(n - j, out.itemsize)
        panel = panels[j * length : (j + wide) * length].reshape(length, wide)
        out[:, j : j + wide] = (a[: len(out), :length] @ panel)[:, : n - j]
        j += wide


def _plain_product_of_transposed(a: Array, b: Array, out: Array, add: bool) -> None:
    m, n = out.shape
    out[...] = (out if add else 0) + a[:, :m].T @ b[:, :n]


if config.DISABLE_JIT:
    product, product_of_transposed = _plain_product, _plain_product_of_transposed
else:
    product, product_of_transposed = compiled(_product), compiled(_product_of_transposed)
