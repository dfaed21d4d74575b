"""What weights start from. Each function fills an array in place from a key, and returns nothing.

fan-in is the number of inputs that an output sums over: I·KH·KW of a convolution's weight, C of a linear layer's.
"""

from __future__ import annotations

import math

import numpy as np

from minigrad.backend import array_module
from minigrad.layout import Array
from minigrad.random import Key, normal, uniform


def fan_in(weight: Array) -> int:
    """How many inputs each output of a weight (O, …) sums over."""
    return math.prod(weight.shape[1:])


def uniform_(weight: Array, key: Key, bound: float) -> None:
    """Uniform in ±bound."""
    _fill(weight, (uniform(key, weight.shape) * 2 - 1) * bound)


def normal_(weight: Array, key: Key, std: float) -> None:
    """Normal with mean 0 and standard deviation `std`."""
    _fill(weight, normal(key, weight.shape) * std)


def truncated_normal_(weight: Array, key: Key, std: float) -> None:
    """Normal with standard deviation `std` before truncation, redrawn until within ±2 std (TensorFlow's)."""
    values, attempt = normal(key, weight.shape), 0
    while (outside := np.abs(values) > 2).any():
        attempt += 1
        values[outside] = normal(key.fold(attempt), int(outside.sum()))
    _fill(weight, values * std)


def he_normal_(weight: Array, key: Key) -> None:
    """Normal with variance 2 / fan-in: keeps the variance through ReLU layers (He et al., arXiv:1502.01852)."""
    normal_(weight, key, math.sqrt(2 / fan_in(weight)))


def xavier_uniform_(weight: Array, key: Key) -> None:
    """Uniform in ±√(3 / fan-in), variance 1 / fan-in: Caffe's "xavier" (after Glorot, Bengio, AISTATS 2010)."""
    uniform_(weight, key, math.sqrt(3 / fan_in(weight)))


def glorot_uniform_(weight: Array, key: Key) -> None:
    """Uniform in ±√(6 / (fan-in + fan-out)), fan-out being O·KH·KW: Glorot, Bengio, AISTATS 2010, TF-slim's default."""
    fan_out = weight.size // weight.shape[1]
    uniform_(weight, key, math.sqrt(6 / (fan_in(weight) + fan_out)))


def torch_default_(weight: Array, key: Key, fan: int) -> None:
    """Uniform in ±1/√fan-in, what PyTorch gives weights and biases of convolutions and linear layers."""
    uniform_(weight, key, 1 / math.sqrt(fan))


def _fill(weight: Array, values: np.ndarray) -> None:
    # The numbers are drawn on the host, so that a model starts equal on either backend.
    weight[...] = array_module(weight).asarray(values.astype(weight.dtype))
