"""The one idea of the library: an activation is a matrix with one row per pixel and one column per channel.

A batch of images has the shape (N, C, H, W), as in every paper and in PyTorch, but the memory of whatever an op
makes is channels-last: the values of one pixel's channels are neighbours. (What a user hands in may lie in any order:
the first op that needs it otherwise makes a copy.) Seen through `pixels` it is the matrix (N·H·W, C), and then

- a 1×1 convolution is a matrix product, with no copy at all;
- a k×k convolution is im2col (one row of patches per output pixel) and a matrix product;
- batch norm is column statistics, ReLU and dropout are elementwise;
- concat is columns side by side, global average pooling the mean over an image's rows.

Only this file decides on an order in memory; elsewhere a transpose is a view. Weights follow the same rule: their
shape is (O, I, KH, KW), their memory (O, KH, KW, I), so that `filter_matrix` is a view.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

import minigrad.memory  # noqa: F401 (which keeps freed memory in the process)
from minigrad.backend import Array, array_module, move
from minigrad.errors import ShapeError

Pair = tuple[int, int]
LINE = 64  # bytes of a cache line


def pixels(x: Array) -> Array:
    """(N, C, H, W) as the matrix (N·H·W, C): a view when x is channels-last, else one copy."""
    n, c, h, w = x.shape
    return x.transpose(0, 2, 3, 1).reshape(n * h * w, c)


def images(matrix: Array, n: int, h: int, w: int) -> Array:
    """The inverse of `pixels`: the matrix (N·H·W, C) as an NCHW view over the same memory."""
    return matrix.reshape(n, h, w, -1).transpose(0, 3, 1, 2)


def empty(xp: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array. NumPy's starts at a cache line, where its vector loops run up to twice as fast."""
    if xp is not np:
        return xp.empty(shape, dtype)
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % LINE
    return np.ndarray(shape, dtype, memory, start)


def empty_images(xp: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised channels-last array of shape (N, C, H, W), or an ordinary one for other ranks."""
    if len(shape) != 4:
        return empty(xp, shape, dtype)
    n, c, h, w = shape
    return empty(xp, (n, h, w, c), dtype).transpose(0, 3, 1, 2)


def channels_last(xp: Any, x: Array) -> Array:
    """x itself if its memory is channels-last (or it is no batch of images), else one channels-last copy."""
    if x.ndim != 4 or x.transpose(0, 2, 3, 1).flags.c_contiguous:
        return x
    y = empty_images(xp, x.shape, x.dtype)
    y[...] = x
    return y


def moved(x: Array, xp: Any) -> Array:
    """x as an array of the module xp; what is copied is channels-last where it is of rank 4."""
    if x.ndim != 4 or array_module(x) is xp:
        return move(x, xp)
    n, _, h, w = x.shape
    return images(move(pixels(x), xp), n, h, w)


def elementwise(function: Any, *arrays: Array) -> Array:
    """function(*arrays) with broadcasting, the result channels-last where it is a batch of images.

    function   a ufunc, or what can be called like one: function(*arrays, out=result)
    arrays     no plain numbers among them; the first gives the dtype

    NumPy's ufuncs keep the strides of their operands and walk in the order of memory, CuPy's always allocate in C
    order and walk in the order of the axes; this is where they agree.
    """
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        raise ShapeError(
            f"shapes {' and '.join(str(array.shape) for array in arrays)} do not go together: counted from the last "
            "axis, sizes must be equal, or one of them 1"
        ) from None
    if len(shape) != 4:
        return function(*arrays)
    result = empty_images(array_module(arrays[0]), shape, arrays[0].dtype)
    by_pixel = (a.reshape((1,) * (4 - a.ndim) + a.shape).transpose(0, 2, 3, 1) for a in arrays)
    function(*by_pixel, out=result.transpose(0, 2, 3, 1))
    return result


def sum_to(dy: Array, shape: tuple[int, ...]) -> Array:
    """Undo a broadcast: sum dy over the axes along which an array of `shape` was repeated."""
    if dy.shape == shape:
        return dy
    padded = (1,) * (dy.ndim - len(shape)) + shape
    axes = tuple(i for i, (have, want) in enumerate(zip(dy.shape, padded, strict=True)) if have != want)
    return dy.sum(axis=axes, keepdims=True).reshape(shape)


def filter_matrix(weight: Array) -> Array:
    """(O, I, KH, KW) as the matrix (O, KH·KW·I): a view, since weights are kept channels-last like images."""
    return weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)


def joined_filters(weights: list[Array]) -> Array:
    """Filter banks (Oᵢ, I, KH, KW) over each other as one (ΣOᵢ, I, KH, KW), channels-last; a single one as it is."""
    if len(weights) == 1:
        return weights[0]
    return array_module(weights[0]).concatenate([w.transpose(0, 2, 3, 1) for w in weights]).transpose(0, 3, 1, 2)


def pair(value: int | tuple[int, int], name: str) -> Pair:
    """An int for both axes, or (height, width)."""
    both = (value, value) if isinstance(value, int) else value
    if not (isinstance(both, tuple) and len(both) == 2 and all(isinstance(size, int) for size in both)):
        raise ShapeError(f"{name} must be an int or a tuple of two, (height, width), got {value!r}")
    return both


class Window(NamedTuple):
    """Where a kernel stops on its way over an image; the same for convolution and pooling.

    Output pixel (i, j) sees the input rows i·stride − padding … + kernel − 1, and columns likewise. Cells outside
    the image are padding. `output` is ⌊(L + 2p − k) / s⌋ + 1 on each axis; in ceil mode ⌈…⌉ + 1, less a last
    window that would start at or beyond L + p.
    """

    input: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    output: Pair

    @classmethod
    def of(
        cls,
        input: Pair,
        kernel: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        *,
        ceil_mode: bool = False,
    ) -> Window:
        """The window's stops on an input of (H, W).

        Raises ShapeError if a size is out of range or no window fits.
        """
        kernel, stride, padding = pair(kernel, "kernel_size"), pair(stride, "stride"), pair(padding, "padding")
        return _window(input, kernel, stride, padding, ceil_mode)

    @property
    def is_pointwise(self) -> bool:
        """True for 1×1, stride 1, no padding: the patch matrix is the pixel matrix itself."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)


@functools.lru_cache(4096)
def _window(input: Pair, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool) -> Window:
    """`Window.of`, worked out once for each form: a training step asks for the same ones again."""
    for name, value, least in (("kernel_size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if min(value) < least:
            raise ShapeError(f"{name} must be at least {least}, got {value}")
    output = []
    for size, k, s, p in zip(input, kernel, stride, padding, strict=True):
        room = size + 2 * p - k
        steps = -(-room // s) if ceil_mode else room // s
        if steps < 0:
            raise ShapeError(
                f"a {kernel[0]}×{kernel[1]} window does not fit the {input[0]}×{input[1]} input with padding "
                f"{padding}: use a larger input or a smaller kernel"
            )
        if ceil_mode and steps * s >= size + p:
            steps -= 1
        output.append(steps + 1)
    return Window(input, kernel, stride, padding, (output[0], output[1]))
