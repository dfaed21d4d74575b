"""The device memory of fake_cupy, its pools, and CUDA graphs over it.

A capture records each call with the addresses of its arrays, and runs none, as on a GPU; but for those whose result is
yet to be seen for its shape: what they change is put back when the capture ends, and what the graph has for itself is
then filled with NaN. A replay makes the calls at the same addresses, whatever lies there by then.

Refused while a graph is captured: what waits for the device, copies from the host, CuPy's own products, other streams,
new cuBLAS handles, kernels that have never run. Refused at a replay: a graph whose memory has gone back to the default
pool, where others get it, or whose own pool is gone. A `MemoryPool` hands a block that has come back to the next who
asks for that size, so that what is kept in a capture's memory is overwritten where CuPy would overwrite it.

What it cannot show: that CUDA records a call that is made here as ours; two streams that run at once.
"""

from __future__ import annotations

import collections
import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

arrays: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()  # those that own device memory
pools: dict[int, weakref.ref[MemoryPool]] = {}  # of those that lie in a pool of somebody's own
_of_thread = threading.local()


def owner(memory: np.ndarray) -> np.ndarray:
    """The array that owns the memory of a view."""
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    return memory


def allocated(memory: np.ndarray) -> None:
    """Tell of device memory."""
    memory = owner(memory)
    arrays[id(memory)] = memory


def around(address: int, size: int) -> np.ndarray | None:
    """The array to which all of so many bytes from here belong."""
    for whole in (ref() for ref in arrays.valuerefs()):  # a list: other threads allocate meanwhile
        if whole is None:
            continue
        start = whole.ctypes.data
        if start <= address and address + size <= start + whole.nbytes:
            return whole
    return None


# ---- Pools ----


class MemoryPool:
    """cupy.cuda.MemoryPool: blocks of memory, which come back when no array lies in them."""

    def __init__(self, allocator: Callable[[int], Any]) -> None:
        self.allocator, self.blocks = allocator, []
        self.free: dict[int, list[np.ndarray]] = collections.defaultdict(list)

    def malloc(self, size: int) -> np.ndarray:
        size = -(-size // 512) * 512
        if self.free[size]:
            return self.free[size].pop()
        self.blocks.append(self.allocator(size).bytes)
        return self.blocks[-1]

    def total_bytes(self) -> int:
        return sum(block.size for block in self.blocks)


@contextmanager
def using_allocator(malloc: Callable[[int], np.ndarray]) -> Iterator[None]:
    """cupy.cuda.using_allocator"""
    before, _of_thread.malloc = getattr(_of_thread, "malloc", None), malloc
    try:
        yield
    finally:
        _of_thread.malloc = before


def taken(shape: Any, dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory, from the pool in use."""
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    malloc, size = getattr(_of_thread, "malloc", None), math.prod(shape) * dtype.itemsize
    if malloc is None or not size:
        return np.empty(shape, dtype)
    block, pool = malloc(size), malloc.__self__  # type: ignore[attr-defined]
    whole = np.frombuffer(memoryview(block)[:size], dtype)  # type: ignore[arg-type]
    pools[id(whole)] = weakref.ref(pool)
    weakref.finalize(whole, _give_back, id(whole), weakref.ref(pool), block)
    return whole.reshape(shape)


def _give_back(key: int, pool: weakref.ref[MemoryPool], block: np.ndarray) -> None:
    del pools[key]
    if (there := pool()) is not None:
        there.free[block.size].append(block)


def taken_like(result: np.ndarray, keep_strides: bool) -> np.ndarray | None:
    """Memory for a result of NumPy's, whose strides it has if asked; None where its own will do."""
    if getattr(_of_thread, "malloc", None) is None:
        return None
    order = sorted(range(result.ndim), key=lambda axis: -result.strides[axis]) if keep_strides else range(result.ndim)
    memory = taken([result.shape[axis] for axis in order], result.dtype)
    return memory.transpose(np.argsort(list(order))) if result.ndim else memory


# ---- Captures ----


class Place(NamedTuple):
    """An array as a graph knows it."""

    low: int
    size: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, x: np.ndarray) -> Place:
        low, high = np.lib.array_utils.byte_bounds(x)
        return cls(low, high - low if x.size else 0, x.ctypes.data - low, x.shape, x.strides, x.dtype)

    def array(self) -> np.ndarray:
        if not self.size:
            return np.empty(self.shape, self.dtype)
        return np.ndarray(self.shape, self.dtype, (ctypes.c_char * self.size).from_address(self.low), self.offset,
                          self.strides)  # fmt: skip


def _each(x: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Nested arguments, with a change to all of one kind."""
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, Mapping):
        return {name: _each(value, kind, change) for name, value in x.items()}
    return type(x)([_each(item, kind, change) for item in x]) if type(x) in (list, tuple) else x


def _arrays(x: Any) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    _each(x, np.ndarray, found.append)
    return found


class Recording:
    """What has been captured: a graph, once it has ended."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.alive = {key: weakref.ref(array) for key, array in arrays.items()}  # when it began
        self.before: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # what it has changed, and how that was
        self.calls: list[tuple[str, Callable[..., Any], Any, Any, Any]] = []
        self.memory: dict[int, tuple[weakref.ref[Any], str]] = {}  # that it uses: an array, or a pool of its own
        self.broken = ""

    def about_to_change(self, given: Any) -> None:
        for x in _arrays(given):
            whole = self._owner(x)
            if whole is not None and id(whole) not in self.before and self.alive.get(id(whole), str)() is whole:
                self.before[id(whole)] = whole, whole.copy()

    def record(self, name: str, function: Callable[..., Any], args: Any, named: Any, result: Any) -> None:
        for x in _arrays((args, named, result)):
            if (whole := self._owner(x)) is not None:
                pool = pools.get(id(whole))
                self.memory[id(whole)] = (weakref.ref(whole), name) if pool is None else (pool, name)
        self.calls.append((name, function, *(_each(x, np.ndarray, Place.of) for x in (args, named, result))))

    def _owner(self, x: np.ndarray) -> np.ndarray | None:
        """None for what is not on the device."""
        whole = owner(x)
        return whole if arrays.get(id(whole)) is whole else around(Place.of(x).low, Place.of(x).size)

    def end(self) -> None:
        for whole, values in self.before.values():
            whole[...] = values
        self.before.clear()
        for pool in [ref() for ref, _ in self.memory.values()]:
            for block in pool.blocks if isinstance(pool, MemoryPool) else ():
                block[...] = 255  # NaN, or −1

    def replay(self) -> None:
        for ref, name in self.memory.values():
            if ref() is None:
                raise RuntimeError(f"{name} of a graph works on memory that was given back, and may be another's")
        for _, function, args, named, result in self.calls:
            args, named, result = (_each(x, Place, Place.array) for x in (args, named, result))
            values = function(*args, **named)
            if isinstance(result, np.ndarray):
                result[...] = values
            else:
                assert result is None, "a call with several results is not stood in for"


def _now() -> Recording | None:
    return getattr(_of_thread, "recording", None)


def begin(stream: Any) -> None:
    assert _now() is None
    _of_thread.recording = Recording(stream)


def end(stream: Any) -> Recording:
    recording = _now()
    if recording is None or recording.stream is not stream:
        raise RuntimeError("this stream is not being captured")
    _of_thread.recording = None
    recording.end()
    if recording.broken:
        raise RuntimeError(f"the capture was invalidated: {recording.broken}")
    return recording


def recording() -> bool:
    """Whether a stream of this thread is being captured."""
    return _now() is not None


def capturing(stream: Any) -> bool:
    """Whether it is this one, or its address."""
    now = _now()
    return now is not None and stream in (now.stream, now.stream.ptr)


def refuse(what: str, kind: type[Exception] = RuntimeError) -> None:
    """Raise what CUDA, or CuPy, raises for this while a graph is captured, which is then broken."""
    if (now := _now()) is not None:
        now.broken = what
        raise kind(f"not permitted while a CUDA graph is captured: {what}")


def check_stream(stream: Any) -> None:
    if recording() and not capturing(stream):
        refuse("work on another stream")


@contextmanager
def only_to_see(*given: Any) -> Iterator[None]:
    """Around a call that is run in a capture too, on values of no account."""
    if (now := _now()) is None:
        yield
        return
    now.about_to_change(given)
    with np.errstate(all="ignore"):
        yield


def do(name: str, function: Callable[..., Any], args: Any, named: Any = None) -> None:
    """Call a function without result, or record the call."""
    if recording():
        record(name, function, args, named)
    else:
        function(*args, **(named or {}))


def record(name: str, function: Callable[..., Any], args: Any, named: Any = None, result: Any = None) -> None:
    if (now := _now()) is not None:
        now.record(name, function, args, named or {}, result)
