"""Leaves for the tests of ops: reproducible numbers, on the host or where a test computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from minigrad import Tensor
from minigrad.random import Key, normal, permutation

Function = Callable[..., Tensor]
Make = Callable[..., Tensor]


def host(*shape: int, name: str = "x") -> Tensor:
    """A leaf on the host, float64, in the order of its axes."""
    return Tensor(normal(Key(7).fold(name, *shape), shape), requires_grad=True)


def leaf_on(xp: Any, *shape: int, name: str = "x", dtype: str = "float64", distinct: bool = False) -> Tensor:
    """A leaf of the backend `xp`, channels-last; on request no two of its values are alike."""
    key = Key(7).fold(name, *shape)
    values = permutation(key, math.prod(shape)).reshape(shape) / 10 - 1 if distinct else normal(key, shape)
    array = xp.asarray(values.astype(dtype))
    if len(shape) == 4:
        array = xp.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return Tensor(array, requires_grad=True)
