"""Counter-based random numbers: a number is a pure function of its key and its index.

There is no generator whose state advances. A `Key` names a stream; `key.fold(...)` names a stream within it by
seed, purpose, step, layer path or picture; element i of a stream is a hash of (key, i). Two draws with the same
key agree, in whatever order, on however many threads, on either backend, before and after a resume; draws with
different keys are independent.

The hash is the output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014), applied once for the key and once for the index.
"""

from __future__ import annotations

import math
import operator
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from minigrad.backend import capturing
from minigrad.errors import BackendError, DtypeError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive counters land far apart
_INT, _STRING = 0xA0761D6478BD642F, 0xE7037ED1A0B428DB  # arbitrary: set ints, strings and row numbers apart
_MULTIPLY_1, _MULTIPLY_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(z: Any) -> Any:
    """SplitMix64's finaliser on a uint64 array (wraps around), in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(_MULTIPLY_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(_MULTIPLY_2)
    z ^= z >> np.uint64(31)
    return z


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MULTIPLY_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLY_2) & _MASK
    return z ^ (z >> 31)


class Key:
    """The name of a stream of random numbers. Immutable; equal keys give equal numbers."""

    __slots__ = ("value",)

    def __init__(self, seed: int = 0):
        try:
            self.value = _mix_int((operator.index(seed) + _GOLDEN) & _MASK)
        except TypeError:
            raise DtypeError(f"a seed is a whole number, got {seed!r}") from None

    def fold(self, *parts: int | str) -> Key:
        """The stream named by `parts` (ints or strings, in order) within this one."""
        value = self.value
        for part in parts:
            if isinstance(part, str):  # its length too, so that ("ab", "c") and ("a", "bc") differ
                encoded = part.encode()
                words = [_STRING, len(encoded)]
                words += [int.from_bytes(encoded[i : i + 8], "little") for i in range(0, len(encoded), 8)]
            else:
                words = [_INT, int(part)]
            for word in words:
                value = _mix_int(((value ^ (word & _MASK)) + _GOLDEN) & _MASK)
        key = Key.__new__(Key)
        key.value = value
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"Key(0x{self.value:016x})"


class StoredKey(Key):
    """The key whose value lies in a uint64 array () of the backend where numbers are drawn, and is read there.

    A CUDA graph that has recorded the draw makes other numbers when that memory has been written anew. There is no
    stream within this one: fold first, then store.
    """

    __slots__ = ()

    def __init__(self, value: Any):
        self.value = value

    def fold(self, *parts: int | str) -> Key:
        raise DtypeError(f"a stored key cannot be folded by {parts}: its value is not on the host")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredKey) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return "StoredKey()"


def check_repeatable(key: Key, xp: Any) -> None:
    """Raise BackendError where a CUDA graph is captured that would draw the same numbers in every replay."""
    if not isinstance(key, StoredKey) and capturing(xp):
        raise BackendError(
            "numbers are drawn by a key that a graph would repeat as it is: a layer that draws must be found as an "
            "attribute of its module, and take its key from set_key"
        )


def bits(key: Key, shape: int | tuple[int, ...], *, rows: Any = None, xp: Any = np) -> Any:
    """Uniform random uint64 of `shape`.

    rows   None, or an int array (shape[0],): the identity of each row, for example the index of its picture in
           the data set. Row r then depends on key and rows[r] alone, not on its place in the batch.
    """
    check_repeatable(key, xp)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    stream = key.value if isinstance(key, StoredKey) else np.uint64(key.value)
    if rows is None:
        counter = xp.arange(1, math.prod(shape) + 1, dtype=xp.uint64)
        counter *= np.uint64(_GOLDEN)
        counter += stream
        return _mix(counter).reshape(shape)
    streams = xp.asarray(rows).astype(xp.uint64) + np.uint64(1)
    streams *= np.uint64(_GOLDEN)
    streams += stream
    counter = xp.arange(1, math.prod(shape[1:]) + 1, dtype=xp.uint64)
    counter *= np.uint64(_GOLDEN)
    return _mix(_mix(streams)[:, None] + counter[None, :]).reshape(shape)


def uniform(key: Key, shape: int | tuple[int, ...], *, rows: Any = None, xp: Any = np) -> Any:
    """Uniform float64 in [0, 1) of `shape`; `rows` as in `bits`."""
    return (bits(key, shape, rows=rows, xp=xp) >> np.uint64(11)).astype(xp.float64) * 2.0**-53


def integers(key: Key, high: int, shape: int | tuple[int, ...], *, rows: Any = None, xp: Any = np) -> Any:
    """Uniform int64 in [0, high) of `shape`; `rows` as in `bits`. The bias is below high / 2^53."""
    return (uniform(key, shape, rows=rows, xp=xp) * high).astype(xp.int64)


def normal(key: Key, shape: int | tuple[int, ...], *, rows: Any = None, xp: Any = np) -> Any:
    """Standard normal float64 of `shape` (Box and Muller); `rows` as in `bits`."""
    radius = uniform(key.fold("radius"), shape, rows=rows, xp=xp)
    angle = uniform(key.fold("angle"), shape, rows=rows, xp=xp)
    return xp.sqrt(-2.0 * xp.log(1.0 - radius)) * xp.cos(2.0 * math.pi * angle)


def permutation(key: Key, n: int) -> np.ndarray:
    """A random order of 0 … n−1, as a host int64 array (n,)."""
    return np.argsort(bits(key, n), kind="stable")


class _Streams:
    """The streams of a seed, numbered by the order in which they are taken, for each kind by itself."""

    def __init__(self, seed: int):
        self.key, self.taken, self.lock = Key(seed), Counter[str](), threading.Lock()

    def take(self, kind: str) -> Key:
        with self.lock:
            number = self.taken[kind]
            self.taken[kind] += 1
        return self.key.fold(kind, number) if kind else self.key.fold(number)


# A context variable, so that threads that build models at the same time do not take each other's streams.
_unseeded = _Streams(0)
_streams: ContextVar[_Streams] = ContextVar("streams", default=_unseeded)


def next_key(kind: str = "") -> Key:
    """The next numbered stream: what a layer is initialised from when nobody hands it a key.

    kind   streams that are counted by themselves: taking one moves no other kind's numbers

    Only construction draws from here, never an op: rebuild layers in the same order and they start equal.
    """
    return _streams.get().take(kind)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block `next_key` counts from the beginning of the seed's streams: same layers, same weights. Holds for
    this thread alone."""
    token = _streams.set(_Streams(seed))
    try:
        yield
    finally:
        _streams.reset(token)
