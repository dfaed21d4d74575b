"""The update of all parameters of a model in one launch (optim.cu)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minigrad.backend import array_module, capturing
from minigrad.kernels.cuda.launch import launch, plan
from minigrad.layout import Array, memory_order

CHUNK = 4096  # values of a parameter that one block updates


class Together:
    """One launch of a kernel of optim.cu over many rows of arrays, however many and however large.

    kernel   its name
    firsts   the first array of each row: dtype and sizes are those of the launch, addresses may change

    The kernel reads from tables on the device where the arrays of a row are, and its numbers. What has changed in them
    is written at a launch; but not while a CUDA graph is captured, which would write the same ever after. So whoever
    has captured a launch says what is new with `place` and `tell`, and calls `upload` before each replay.
    """

    def __init__(self, kernel: str, firsts: Sequence[Array]):
        self.kernel, self.like, self.sizes = kernel, firsts[0], [array.size for array in firsts]
        cut = [(i, j, min(size, j + CHUNK)) for i, size in enumerate(self.sizes) for j in range(0, size, CHUNK)]
        self.chunks = array_module(self.like).asarray(np.array(cut, np.int64).reshape(-1, 3))  # (blocks, 3)
        self.placed: tuple[list[int], np.ndarray | None] = [], None  # rows told of, and the table of addresses
        self.told: np.ndarray | None = None  # the table of numbers
        self.known: dict[str, np.ndarray] = {}  # both as they were written; none is ever changed, but replaced
        self.addresses: Array = None  # (rows, arrays) int64, on the device
        self.numbers: Array = None  # (rows, numbers) float64, on the device

    def takes(self, row: int, *arrays: Array | None) -> bool:
        """Whether these arrays can stand in a row: one value after the other, in the same order in all of them."""
        given = [array for array in arrays if array is not None]
        orders = {memory_order(a.shape, a.strides, a.itemsize) for a in given}
        kind = type(self.like), self.like.dtype, given[0].shape
        alike = all((type(a), a.dtype, a.shape) == kind for a in given)
        return alike and len(orders) == 1 and None not in orders and given[0].size == self.sizes[row]

    def place(self, rows: Mapping[int, Sequence[Array | None]]) -> None:
        """Tell where arrays are, of one size in a row, the first never None; a row not told of is left alone."""
        addresses = {i: [0 if array is None else array.data.ptr for array in arrays] for i, arrays in rows.items()}
        self.placed = list(rows), self._table(addresses, self.placed[1], np.int64)

    def tell(self, rows: Mapping[int, Sequence[float]]) -> None:
        """Tell the numbers of rows."""
        self.told = self._table(rows, self.told, np.float64)

    def _table(self, rows: Mapping[int, Sequence[float]], before: np.ndarray | None, dtype: Any) -> np.ndarray:
        width = len(next(iter(rows.values()))) if before is None else before.shape[1]
        table = np.zeros((len(self.sizes), width), dtype)
        for i, values in rows.items():
            table[i] = values
        return table

    def upload(self) -> None:
        """Write what has changed to the tables on the device, always in the same memory: a graph reads it there."""
        for name, table in (("addresses", self.placed[1]), ("numbers", self.told)):
            assert table is not None
            known = self.known.get(name)
            if known is None:
                setattr(self, name, array_module(self.like).empty(table.shape, table.dtype))
            elif table is known or np.array_equal(table, known):
                continue
            getattr(self, name).set(table)  # it need not stay: it has been copied when this returns
            self.known[name] = table

    def load(self) -> None:
        """What the first launch does besides, and a capture cannot: compile the kernel, and write the tables."""
        if blocks := len(self.chunks):
            plan(array_module(self.like), "optim", self.kernel, self.like.dtype.char, "i", blocks, 1, 1, blocks)
        self.upload()

    def launch(self, kernel: str = "", *more: Any) -> None:
        """Start the kernel, or another one, on what was told last; `more` is what else it takes."""
        if not capturing(array_module(self.like)):
            self.upload()
        tables = self.chunks, self.addresses, self.addresses.shape[1], self.numbers, self.numbers.shape[1]
        if blocks := len(self.chunks):
            launch("optim", kernel or self.kernel, self.like, blocks, 1, *tables, *more, parts=blocks)


def clip(together: Together, gradients: list[Array], into: list[Array], max_norm: float) -> Array:
    """Write the gradients, scaled to a joint norm of at most max_norm, into arrays like them; return the norm, (1,)."""
    together.place(dict(enumerate(zip(into, gradients, strict=True))))
    together.tell(dict.fromkeys(range(len(into)), (max_norm,)))
    xp, blocks = array_module(into[0]), len(together.chunks)
    squares, norm = xp.empty(blocks, np.float64), xp.zeros(1, np.float64)
    together.launch("squares", squares)
    together.launch("clip", squares, blocks, norm)
    return norm
