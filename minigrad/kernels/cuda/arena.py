"""Many arrays copied to their places in one, in a single launch (arena.cu): see minigrad.arena."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minigrad.backend import array_module, capturing
from minigrad.kernels.cuda.launch import launch
from minigrad.layout import Array, channels_last

CHUNK = 4096  # values that one block gathers


class Gather:
    """Copies many arrays to their places in one, in a single launch, however many and however large.

    like     an array of their dtype
    sizes    of the arrays, values
    starts   where each begins in the array into which all are copied

    The kernel reads the arrays' addresses from a table on the device. While a CUDA graph is captured, no table can be
    written: the graph gets a table of its own, which `finish_capture` fills.
    """

    def __init__(self, like: Array, sizes: Sequence[int], starts: Sequence[int]):
        cut = [(i, j, min(size, j + CHUNK)) for i, size in enumerate(sizes) for j in range(0, size, CHUNK)]
        xp = array_module(like)
        self.chunks = xp.asarray(np.array([(*chunk, starts[chunk[0]]) for chunk in cut], np.int64).reshape(-1, 4))
        self.table, self.known = xp.empty(len(sizes), np.int64), np.full(len(sizes), -1)
        # For the next graph. It is made before: a graph would use memory that it takes itself for other things too.
        self.next_table, self.unfilled = xp.empty(len(sizes), np.int64), self.known

    def __call__(self, arrays: Sequence[Array | None], into: Array) -> None:
        xp = array_module(into)
        lying = [
            None if x is None else channels_last(xp, x if x.ndim == 4 else xp.ascontiguousarray(x)) for x in arrays
        ]
        addresses = np.array([0 if x is None else x.data.ptr for x in lying], np.int64)
        table = self.table
        if capturing(xp):
            table, self.unfilled = self.next_table, addresses
        elif not np.array_equal(addresses, self.known):
            table.set(addresses)
            self.known = addresses
        if blocks := len(self.chunks):
            launch("arena", "gather", into, blocks, 1, self.chunks, table, into, parts=blocks)

    def finish_capture(self) -> Array:
        """Fill the table of the graph captured last, and return it: it must live as long as the graph."""
        table, self.next_table = self.next_table, array_module(self.table).empty(len(self.unfilled), np.int64)
        table.set(self.unfilled)
        return table
