"""Convolution."""

from __future__ import annotations

from minigrad.errors import ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array, Window
from minigrad.ops.dense import concat
from minigrad.tensor import Tensor, check_alike, record


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> Tensor:
    """Cross-correlate every image with every filter.

        y[n, o, i, j] = Σ_c Σ_u Σ_v  x[n, c, i·s + u − p, j·s + v − p] · weight[o, c, u, v]  (+ bias[o])

    x        (N, C, H, W)
    weight   (O, C / groups, KH, KW)
    bias     (O,) or None
    stride, padding   cells, one number or (height, width); padding is zeros on both sides
    groups   cut the channels, and the filters, into so many equal parts: filters see the channels of their part alone.
             With groups = C it is a depthwise convolution.
    returns  (N, O, OH, OW),  OH = ⌊(H + 2p − KH) / s⌋ + 1
    saves    x, weight
    costs    N·O·OH·OW·C·KH·KW / groups multiply-adds, twice that again in backward
    raises   ShapeError if the channels differ, do not divide into the groups, or no window fits
    """
    if groups != 1:
        return _by_groups(x, weight, bias, groups, stride, padding)
    check_alike("conv2d", x, weight, *([] if bias is None else [bias]))
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        got = f"{x.shape[1]} channels" if x.ndim == 4 else f"an input of shape {x.shape}"
        wants = f"{weight.shape[1]} channels" if x.ndim == 4 and weight.ndim == 4 else "(N, C, H, W)"
        raise ShapeError(f"conv2d got {got}, weight {weight.shape} wants {wants}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"conv2d got a bias of shape {bias.shape} for {weight.shape[0]} filters")
    if x.size == 0:
        raise ShapeError(f"conv2d got an empty input {x.shape}")
    window = Window.of(x.shape[2:], weight.shape[2:], stride, padding)
    # What backward needs is captured now, as arrays: it must not see what the tensors hold by then.
    images_in, filters, needs_dx = x.data, weight.data, x.needs_grad
    needs_dw, with_bias = weight.needs_grad, bias is not None
    k = kernels(images_in)
    y = k.conv2d(images_in, filters, None if bias is None else bias.data, window)

    def backward(dy: Array) -> tuple[Array | None, ...]:
        return k.conv2d_backward(dy, images_in, filters, window, needs_dx, needs_dw, with_bias)

    multiply_adds = y.size * filters[0].size
    return record("conv2d", y, (x, weight, bias), backward, multiply_adds=multiply_adds)


def _by_groups(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, stride, padding) -> Tensor:  # type: ignore[no-untyped-def]
    """Each group's channels with its own filters, and the results side by side."""
    check_alike("conv2d", x, weight, *([] if bias is None else [bias]))
    if x.ndim != 4 or weight.ndim != 4 or groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ShapeError(
            f"conv2d cannot cut an input of shape {x.shape} and weight {weight.shape} into {groups} groups: "
            "channels and filters must be multiples of it"
        )
    c, o = x.shape[1] // groups, weight.shape[0] // groups
    channels, filters = ([slice(g * size, (g + 1) * size) for g in range(groups)] for size in (c, o))
    return concat(
        [
            conv2d(x[:, i], weight[j], None if bias is None else bias[j], stride=stride, padding=padding)
            for i, j in zip(channels, filters, strict=True)
        ]
    )
