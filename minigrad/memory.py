"""How the process keeps its memory: set once, when minigrad is imported."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable


def keep() -> None:
    """Keep freed memory in the process: a training step allocates the same arrays again and again, and fresh
    pages from the kernel cost more than the arithmetic on them. glibc only; elsewhere nothing happens.

    It holds for the whole process, whose memory then shrinks only where the end of the heap is free: after large
    arrays it can stay large. MINIGRAD_KEEP_MEMORY=0 leaves the C library as it is.
    """
    if sys.platform != "linux" or os.environ.get("MINIGRAD_KEEP_MEMORY") == "0":
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)


keep()
