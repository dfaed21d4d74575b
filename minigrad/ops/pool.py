"""Pooling: the maximum or the mean of every window."""

from __future__ import annotations

from minigrad.backend import array_module
from minigrad.errors import ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array, Window, empty_images, pair, pixels
from minigrad.tensor import Tensor, check_alike, record


def pooling_window(
    op: str,
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None,
    padding: int | tuple[int, int],
    ceil_mode: bool,
) -> Window:
    """The window of a pooling op; ShapeError if the padding could fill a whole window."""
    check_alike(op, x)
    if x.ndim != 4 or x.size == 0:
        raise ShapeError(f"{op} wants (N, C, H, W), none of them 0, got {x.shape}")
    stride = kernel_size if stride is None else stride
    window = Window.of(x.shape[2:], kernel_size, stride, padding, ceil_mode=ceil_mode)
    if any(2 * p > k for p, k in zip(window.padding, window.kernel, strict=True)):
        raise ShapeError(f"{op}: padding must be at most half of the kernel {window.kernel}, got {window.padding}")
    return window


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    *,
    ceil_mode: bool = False,
) -> Tensor:
    """The maximum of each window; cells outside the image count as −∞.

        y[n, c, i, j] = max_{u, v}  x[n, c, i·s + u − p, j·s + v − p]

    Backward hands dy to the first maximum of the window in row-major order. After a ReLU ties are the normal case.

    x        (N, C, H, W)
    stride   kernel_size if None
    returns  (N, C, OH, OW),  OH = ⌊(H + 2p − K) / s⌋ + 1; rounded up in ceil mode (see layout.Window)
    saves    which cell of each window it was: a byte for each of N·C·H·OW, and one for each of N·C·OH·OW
    raises   ShapeError if no window fits, or the padding is more than half of the kernel
    """
    window = pooling_window("max_pool2d", x, kernel_size, stride, padding, ceil_mode)
    if max(window.kernel) > 127:  # a byte says which cell
        raise ShapeError(f"max_pool2d takes kernels up to 127×127, got {window.kernel}")
    k = kernels(x.data)
    if not x.needs_grad:
        return record("max_pool2d", k.max_pool(x.data, window), (x,), lambda dy: None, kept=())
    y, winners = k.max_pool_winners(x.data, window)
    return record("max_pool2d", y, (x,), lambda dy: k.max_pool_dx(dy, winners, window), kept=())


def avg_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    *,
    ceil_mode: bool = False,
    count_padding: bool = True,
) -> Tensor:
    """The mean of each window.

    count_padding   True: padding cells count as zeros. False: the mean of the cells inside the image alone, as
                    TensorFlow's SAME pooling does. What ceil mode adds beyond the padding never counts.

    x        (N, C, H, W)
    returns  (N, C, OH, OW), sizes as in max_pool2d
    saves    nothing
    raises   ShapeError if no window fits, or the padding is more than half of the kernel
    """
    window = pooling_window("avg_pool2d", x, kernel_size, stride, padding, ceil_mode)
    k = kernels(x.data)
    y = k.avg_pool(x.data, window, count_padding)
    return record("avg_pool2d", y, (x,), lambda dy: k.avg_pool_dx(dy, window, count_padding), kept=())


def adaptive_avg_pool2d(x: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """The mean over a grid of windows that covers the image, whatever its size.

    Cell i of o covers the input cells ⌊i·L/o⌋ … ⌈(i+1)·L/o⌉ (exclusive); neighbours may overlap. The whole op is
    one product per image with a matrix whose rows hold the windows' weights: y = A · x, dx = Aᵀ · dy.

    x        (N, C, H, W)
    returns  (N, C, OH, OW)
    saves    nothing but A (OH·OW, H·W)
    """
    check_alike("adaptive_avg_pool2d", x)
    oh, ow = pair(output_size, "output_size")
    if x.ndim != 4 or x.size == 0 or min(oh, ow) < 1:
        raise ShapeError(
            f"adaptive_avg_pool2d wants (N, C, H, W), none of them 0, and sizes of at least 1, got {x.shape}, {oh}×{ow}"
        )
    xp, k, (n, c, h, w) = array_module(x.data), kernels(x.data), x.shape
    down, across = (_adaptive_weights(xp, size, o, x.dtype) for size, o in ((h, oh), (w, ow)))
    a = (down[:, None, :, None] * across[None, :, None, :]).reshape(oh * ow, h * w)

    def product(matrix: Array, source: Array, size: tuple[int, int]) -> Array:
        result = empty_images(xp, (n, c, *size), source.dtype)
        k.matmul(matrix, pixels(source).reshape(n, -1, c), pixels(result).reshape(n, -1, c))
        return result

    y = product(a, x.data, (oh, ow))
    return record("adaptive_avg_pool2d", y, (x,), lambda dy: product(a.T, dy, (h, w)), kept=())


def _adaptive_weights(xp, size: int, cells: int, dtype) -> Array:  # type: ignore[no-untyped-def]
    """(cells, size): row i is 1/width on the cells that window i covers, 0 elsewhere."""
    weights = xp.zeros((cells, size), dtype)
    for i in range(cells):
        start, stop = i * size // cells, -(-(i + 1) * size // cells)
        weights[i, start:stop] = 1.0 / (stop - start)
    return weights


def global_avg_pool2d(x: Tensor) -> Tensor:
    """The mean over all pixels of each image: (N, C, H, W) to (N, C, 1, 1). Saves nothing but H·W equal weights."""
    return adaptive_avg_pool2d(x, 1)
