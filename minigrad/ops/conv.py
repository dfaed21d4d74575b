"""Convolution, alone and with the batch norm and ReLU that follow it in these networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from minigrad.backend import array_module
from minigrad.errors import GraphError, ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array, Window, joined_filters
from minigrad.ops.dense import concat
from minigrad.ops.norm import check_count, check_statistics
from minigrad.tensor import Tensor, check_alike, record, record_parts

Size = int | tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
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
    window = _window(x, weight, bias, stride, padding)
    # What backward needs is captured now, as arrays: it must not see what the tensors hold by then.
    images_in, filters, needs_dx = x.data, weight.data, x.needs_grad
    needs_dw, with_bias = weight.needs_grad, bias is not None
    k = kernels(images_in)
    y = k.conv2d(images_in, filters, None if bias is None else bias.data, window)

    def backward(dy: Array) -> tuple[Array | None, ...]:
        return k.conv2d_backward(dy, images_in, filters, window, needs_dx, needs_dw, with_bias)

    multiply_adds = y.size * filters[0].size
    kept = (x if needs_dw else None, weight if needs_dx else None)
    return record("conv2d", y, (x, weight, bias), backward, kept=kept, multiply_adds=multiply_adds)


def _by_groups(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, stride: Size, padding: Size) -> Tensor:
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


class ConvNorm(NamedTuple):
    """What a convolution and the batch norm after it consist of: see conv2d and batch_norm."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor
    beta: Tensor
    running_mean: Array
    running_var: Array


def conv_bn_relu(
    x: Tensor,
    units: Sequence[ConvNorm],
    *,
    stride: Size = 1,
    padding: Size = 0,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Tensor]:
    """relu(batch_norm(conv2d(x))) for one unit, or for several that see the same input through the same window.

    Their filters side by side are one filter bank: one product reads x once, and in backward one product gives dx,
    where several units would each give a part. Each channel of the result is still its own filter's, so that nothing
    changes but rounding. On the host, in training, the statistics are taken from each block of the convolution's result
    while it is in the cache, and the gradient of that result is computed block by block where the convolution's
    backward reads it; in evaluation batch norm, then an affine map, is folded into the filters, or applied to the
    pixels where these are fewer.

    A bias only moves the mean, which batch norm takes off again. So it is added to no pixel, but to the mean that the
    running mean moves to; in training its gradient is 0.

    x        (N, C, H, W)
    returns  (N, Oᵢ, OH, OW) for each unit
    saves    x, the filters, the convolution's result, and mean, variance, gamma and beta of every channel
    costs    what the convolutions cost
    raises   what conv2d and batch_norm raise; GraphError for a gradient in evaluation
    """
    windows = [_window(x, unit.weight, unit.bias, stride, padding) for unit in units]
    if any(window != windows[0] for window in windows) or len({unit.bias is None for unit in units}) > 1:
        sizes = ", ".join(str(unit.weight.shape) for unit in units)
        raise ShapeError(f"conv_bn_relu wants filters of one size, all with a bias or none: got {sizes}")
    for unit in units:
        filters, *norm = [v.shape for v in (unit.weight, unit.gamma, unit.beta, unit.running_mean, unit.running_var)]
        if any(shape != filters[:1] for shape in norm):
            raise ShapeError(
                f"conv_bn_relu got {filters[0]} filters, and gamma, beta, running mean and variance of {norm}"
            )
        check_statistics("conv_bn_relu", x, unit.running_mean, unit.running_var)
    parameters = [parameter for unit in units for parameter in unit[:4]]
    check_alike("conv_bn_relu", x, *(parameter for parameter in parameters if parameter is not None))
    if not training and any(tensor is not None and tensor.needs_grad for tensor in (x, *parameters)):
        raise GraphError("conv_bn_relu in evaluation has no gradient: use batch_norm(conv2d(x)), or no_grad()")
    k, xp, window = kernels(x.data), array_module(x.data), windows[0]
    images_in, weights, with_bias = x.data, [unit.weight.data for unit in units], units[0].bias is not None
    filters = joined_filters(weights)
    gamma, beta = (_joined([p.data for p in ps]) for ps in ([u.gamma for u in units], [u.beta for u in units]))
    bias = _joined([unit.bias.data for unit in units if unit.bias is not None]) if with_bias else None
    ends = list(itertools.accumulate(len(unit.gamma) for unit in units))
    parts = [slice(end - len(unit.gamma), end) for unit, end in zip(units, ends, strict=True)]
    if not training:
        mean, var = (_joined(vs) for vs in ([u.running_mean for u in units], [u.running_var for u in units]))
        z = k.conv_bn_relu(images_in, filters, window, mean if bias is None else mean - bias, var, gamma, beta, eps)
        costs = _costs(z, units)  # nothing needs a gradient here, so that any backward will do
        return record_parts("conv_bn_relu", [z[:, p] for p in parts], (x, *parameters), list, multiply_adds=costs)
    check_count((len(images_in), len(filters), *window.output))
    needs_dx = x.needs_grad
    y, mean, var = k.conv2d_statistics(images_in, filters, window)
    moved = mean if bias is None else mean + bias
    for unit, part in zip(units, parts, strict=True):
        k.move_running(unit.running_mean, unit.running_var, moved[part], var[part], y.size // len(filters), momentum)
    z = k.batch_norm(y, mean, var, gamma, beta, eps, True)
    shapes = [z[:, part].shape for part in parts]

    def backward(dzs: list[Array | None]) -> list[Array | None]:
        given = [xp.zeros(shape, y.dtype) if dz is None else dz for dz, shape in zip(dzs, shapes, strict=True)]
        filters = joined_filters(weights)  # joined again rather than kept
        dx, dw, dgamma, dbeta = k.conv_bn_relu_backward(
            given, images_in, filters, window, y, mean, var, gamma, beta, eps, needs_dx
        )
        db = xp.zeros_like(dbeta) if with_bias else None
        gradients = (dw, db, dgamma, dbeta)
        return [dx, *(None if whole is None else whole[part] for part in parts for whole in gradients)]

    kept = [x, *(unit.weight for unit in units)]
    if len(units) == 1:  # else gamma and beta have been copied
        kept += [units[0].gamma, units[0].beta]
    return record_parts(
        "conv_bn_relu",
        [z[:, part] for part in parts],
        (x, *parameters),
        backward,
        kept=kept,
        multiply_adds=_costs(z, units),
    )


def _joined(arrays: list[Array]) -> Array:
    """Arrays (Cᵢ,) one after the other as (ΣCᵢ,); a single one as it is."""
    return arrays[0] if len(arrays) == 1 else array_module(arrays[0]).concatenate(arrays)


def _window(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size) -> Window:
    """The window of a convolution; ShapeError where its operands do not fit together."""
    check_alike("conv2d", x, weight, *([] if bias is None else [bias]))
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        c = weight.shape[1] if weight.ndim == 4 else "C"
        raise ShapeError(
            f"conv2d got an input of shape {x.shape}, weight {weight.shape} wants (N, {c}, H, W)"
            + (": move the channels with x.transpose(0, 3, 1, 2)" if x.shape[3:] == weight.shape[1:2] else "")
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"conv2d got a bias of shape {bias.shape} for {weight.shape[0]} filters")
    if x.size == 0:
        raise ShapeError(f"conv2d got an empty input {x.shape}")
    return Window.of(x.shape[2:], weight.shape[2:], stride, padding)


def _costs(z: Array, units: Sequence[ConvNorm]) -> list[int]:
    """Multiply-adds of each unit: pixels times the size of its weight."""
    return [z.size // z.shape[1] * unit.weight.size for unit in units]
