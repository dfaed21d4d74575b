"""Layers: an op with its parameters and options. Options are keyword-only but for the few that every paper names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from minigrad import backend, ops
from minigrad.errors import MinigradError, ShapeError
from minigrad.layout import Array, pair
from minigrad.nn import init
from minigrad.nn.module import Module, Parameter, new_parameter
from minigrad.ops.activation import check_probability
from minigrad.random import Key, next_key
from minigrad.tensor import Tensor, watcher

Size = int | tuple[int, int]


class Conv2d(Module):
    """Convolution, (N, in_channels, H, W) to (N, out_channels, OH, OW): see ops.conv2d.

    Starts as PyTorch's does: weight and bias uniform in ±1/√fan-in.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
    ):
        self.kernel_size, self.stride = pair(kernel_size, "kernel_size"), pair(stride, "stride")
        self.padding, self.groups = pair(padding, "padding"), groups
        kernel = min(self.kernel_size)
        _positive(self, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ShapeError(f"Conv2d: {groups} groups do not divide {in_channels} → {out_channels} channels")
        self.weight = new_parameter((out_channels, in_channels // groups, *self.kernel_size))
        self.bias = new_parameter((out_channels,)) if bias else None
        _initialise(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding, groups=self.groups)

    def extra_repr(self) -> str:
        o, i, kh, kw = self.weight.shape
        options = f"{f', groups={self.groups}' * (self.groups > 1)}{', bias=False' * (self.bias is None)}"
        return f"{i * self.groups} → {o}, {kh}×{kw}, stride={self.stride}, padding={self.padding}{options}"


class Linear(Module):
    """Fully connected, (N, in_features) to (N, out_features): see ops.linear. Starts as Conv2d does."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        _positive(self, in_features=in_features, out_features=out_features)
        self.weight = new_parameter((out_features, in_features))
        self.bias = new_parameter((out_features,)) if bias else None
        _initialise(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} → {self.weight.shape[0]}{'' if self.bias is not None else ', bias=False'}"


class BatchNorm2d(Module):
    """Batch norm over N, H, W of (N, channels, H, W), with ReLU in the same pass if asked: see ops.batch_norm.

    gamma starts at 1, beta at 0, running_mean at 0, running_var at 1.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, relu: bool = False):
        _positive(self, channels=channels)
        self.eps, self.momentum, self.relu = eps, momentum, relu
        self.gamma, self.beta = new_parameter((channels,)), new_parameter((channels,))
        xp = backend.default_module()
        self.running_mean, self.running_var = (
            Tensor(xp.zeros(channels, "float32")),
            Tensor(xp.ones(channels, "float32")),
        )
        self.gamma.data[...], self.beta.data[...] = 1, 0

    def forward(self, x: Tensor) -> Tensor:
        y = ops.batch_norm(
            x,
            self.gamma,
            self.beta,
            self.running_mean.data,
            self.running_var.data,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            relu=self.relu,
        )
        self.count_moves()
        return y

    def count_moves(self) -> None:
        """Count the change of the running statistics by a forward pass, if it was one in training."""
        if self.training:
            self.running_mean.changed("a forward pass in training")
            self.running_var.changed("a forward pass in training")

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[0]}, eps={self.eps}, momentum={self.momentum}{', relu=True' if self.relu else ''}"


class ConvNormReLU(Module):
    """Convolution, batch norm and ReLU as one: batchnorm(conv(x)), by ops.conv_bn_relu where that applies.

    Its children `conv` and `batchnorm`, which has the ReLU, work alone, too. Raises MinigradError if it has none.
    """

    def __init__(self, conv: Conv2d, batchnorm: BatchNorm2d):
        if not batchnorm.relu:
            raise MinigradError(
                "ConvNormReLU takes its ReLU from the batch norm: give it BatchNorm2d(…, relu=True), or use "
                "Sequential(conv, batchnorm) without a ReLU"
            )
        self.conv, self.batchnorm = conv, batchnorm

    @property
    def is_plain(self) -> bool:
        """Whether ops.conv_bn_relu computes what the children do: a child may have been replaced, or changed."""
        kinds = type(self.conv).forward is Conv2d.forward and type(self.batchnorm).forward is BatchNorm2d.forward
        return kinds and self.batchnorm.relu and self.conv.groups == 1

    @property
    def is_pointwise(self) -> bool:
        """Whether it is plain, and its convolution 1×1 with stride 1."""
        return self.is_plain and self.conv.kernel_size == self.conv.stride == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return together(x, self)[0]


def together(x: Tensor, *units: ConvNormReLU) -> list[Tensor]:
    """The results of units that see the same input: computed at once where they differ in their filters alone.

    Each filter's result is independent of the others, so only rounding changes. A joined bank may be large enough for
    Winograd's method where a single one is not.
    """
    if not all(unit.is_plain for unit in units):
        return _one_by_one(x, units)
    conv, norm = units[0].conv, units[0].batchnorm
    kinds = {
        (u.conv.kernel_size, u.conv.stride, u.conv.padding, u.conv.bias is None,
         u.batchnorm.eps, u.batchnorm.momentum, u.batchnorm.training)
        for u in units
    }  # fmt: skip
    parts = [
        ops.ConvNorm(u.conv.weight, u.conv.bias, u.batchnorm.gamma, u.batchnorm.beta,
                     u.batchnorm.running_mean.data, u.batchnorm.running_var.data)
        for u in units
    ]  # fmt: skip
    wanted = any(t is not None and t.needs_grad for t in (x, *(p for u in parts for p in u[:4])))
    if len(kinds) > 1 or (wanted and not norm.training):  # the op has no gradient in evaluation
        return _one_by_one(x, units)
    watching, events = watcher.get(), []
    token = watcher.set(lambda *event: events.append(event))
    try:
        results = ops.conv_bn_relu(
            x,
            parts,
            stride=conv.stride,
            padding=conv.padding,
            training=norm.training,
            momentum=norm.momentum,
            eps=norm.eps,
        )
    except MinigradError:  # one by one they say which of them it is
        return _one_by_one(x, units)
    finally:
        watcher.reset(token)
    for unit in units:
        unit.batchnorm.count_moves()
    if watching is not None:
        with nullcontext() if len(units) == 1 else units[0].called(*units[1:]):
            watching(*events[0])
    return results


def _one_by_one(x: Tensor, units: Sequence[ConvNormReLU]) -> list[Tensor]:
    return [unit.batchnorm(unit.conv(x)) if len(units) == 1 else unit(x) for unit in units]


class LocalResponseNorm(Module):
    """Normalisation by neighbouring channels: see ops.local_response_norm."""

    def __init__(self, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0):
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        return ops.local_response_norm(x, self.size, alpha=self.alpha, beta=self.beta, k=self.k)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class MaxPool2d(Module):
    """The maximum of each window: see ops.max_pool2d."""

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, *, ceil_mode: bool = False):
        self.kernel_size, self.padding, self.ceil_mode = kernel_size, padding, ceil_mode
        self.stride = kernel_size if stride is None else stride

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool2d(x, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode)

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}{', ceil' if self.ceil_mode else ''}"


class AvgPool2d(Module):
    """The mean of each window: see ops.avg_pool2d."""

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        *,
        ceil_mode: bool = False,
        count_padding: bool = True,
    ):
        self.kernel_size, self.padding, self.ceil_mode = kernel_size, padding, ceil_mode
        self.stride = kernel_size if stride is None else stride
        self.count_padding = count_padding

    def forward(self, x: Tensor) -> Tensor:
        options = {"ceil_mode": self.ceil_mode, "count_padding": self.count_padding}
        return ops.avg_pool2d(x, self.kernel_size, self.stride, self.padding, **options)

    def extra_repr(self) -> str:
        counted = "" if self.count_padding else ", count_padding=False"
        ceil = ", ceil" if self.ceil_mode else ""
        return f"{self.kernel_size}, stride={self.stride}, padding={self.padding}{ceil}{counted}"


class AdaptiveAvgPool2d(Module):
    """The mean over a grid of windows of any image: see ops.adaptive_avg_pool2d. 1 is the global mean."""

    def __init__(self, output_size: Size):
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        return ops.adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self) -> str:
        return f"{self.output_size}"


class ReLU(Module):
    """max(0, x)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class Flatten(Module):
    """(N, C, H, W) to (N, C·H·W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten()


class Dropout(Module):
    """Drop values with probability p in training, pass everything on in evaluation: see ops.dropout.

    `model.set_key` hands every dropout layer its random numbers for a step. A layer that never got a key draws
    from a stream of its own (numbered by the order of construction), a new mask at every call. With a key, a layer that
    is used twice drops the same values in both uses.
    """

    def __init__(self, p: float):
        check_probability(p)
        self.p = p
        self.key: Key | None = None
        self.rows: Array | None = None
        self._own_key, self._calls = next_key("dropout"), 0

    def take_key(self, key: Key, rows: Array | None) -> None:
        self.key, self.rows = key, rows

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        key = self.key
        if key is None:
            key = self._own_key.fold(self._calls)
            self._calls += 1
        return ops.dropout(x, self.p, key, rows=self.rows)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _initialise(weight: Parameter, bias: Parameter | None) -> None:
    key, fan = next_key(), init.fan_in(weight.data)
    init.torch_default_(weight.data, key.fold("weight"), fan)
    if bias is not None:
        init.torch_default_(bias.data, key.fold("bias"), fan)


def _positive(module: Module, **sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ShapeError(f"{type(module).__name__}: {name} must be an int of at least 1, got {size!r}")
