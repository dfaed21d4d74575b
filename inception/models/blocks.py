"""What the networks are made of: the four classes of the article, and the words in which tables are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from minigrad import Tensor, nn, ops
from minigrad.errors import ShapeError

Size = int | tuple[int, int]


class ConvBlock(nn.ConvNormReLU):
    """The unit of every network here: convolution, batch norm, ReLU.

    in_channels, out_channels   then the options of nn.Conv2d
    eps, momentum               the options of nn.BatchNorm2d
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias),
            nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum, relu=True),
        )


class ConvReLU(nn.Module):
    """The unit before batch norm: convolution with bias, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: Size, stride: Size = 1, padding: Size = 0):
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Unit(Protocol):
    """Something that builds convolution units: ConvBlock, ConvBlock with other defaults, ConvReLU."""

    def __call__(
        self, in_channels: int, out_channels: int, *, kernel_size: Size, stride: Size = 1, padding: Size = 0
    ) -> nn.Module: ...


class InceptionBlock(nn.Branches):
    """The Inception module with dimension reduction (figure 2b of arXiv:1409.4842).

        1×1  |  1×1 reduce → 3×3  |  1×1 reduce → 5×5  |  3×3 max pool → 1×1         joined along the channels

    The six widths stand in the order of the paper's table. (N, in_channels, H, W) to (N, out_channels, H, W).

    kernels   of the units behind the second reduction: the paper's 5×5; later ports have a 3×3 there, or two
    """

    def __init__(
        self,
        in_channels: int,
        out_1x1: int,
        red_3x3: int,
        out_3x3: int,
        red_5x5: int,
        out_5x5: int,
        out_1x1pool: int,
        *,
        unit: Unit = ConvBlock,
        kernels: Sequence[int] = (5,),
    ):
        five = [
            unit(width, out_5x5, kernel_size=kernel, padding=kernel // 2)
            for kernel, width in zip(kernels, (red_5x5, out_5x5), strict=False)
        ]
        super().__init__(
            branch1=unit(in_channels, out_1x1, kernel_size=1),
            branch2=nn.Sequential(
                unit(in_channels, red_3x3, kernel_size=1),
                unit(red_3x3, out_3x3, kernel_size=3, padding=1),
            ),
            branch3=nn.Sequential(
                unit(in_channels, red_5x5, kernel_size=1),
                *five,
            ),
            branch4=nn.Sequential(
                nn.MaxPool2d(3, stride=1, padding=1),
                unit(in_channels, out_1x1pool, kernel_size=1),
            ),
        )
        self.out_channels = out_1x1 + out_3x3 + out_5x5 + out_1x1pool


class NaiveInceptionBlock(nn.Branches):
    """The naive Inception module (figure 2a of arXiv:1409.4842): no reductions, no projection after the pool.

        1×1  |  3×3  |  5×5  |  3×3 max pool

    The pool passes all input channels on, so every module is wider than the one before it.
    """

    def __init__(self, in_channels: int, out_1x1: int, out_3x3: int, out_5x5: int, *, unit: Unit = ConvBlock):
        super().__init__(
            branch1=unit(in_channels, out_1x1, kernel_size=1),
            branch2=unit(in_channels, out_3x3, kernel_size=3, padding=1),
            branch3=unit(in_channels, out_5x5, kernel_size=5, padding=2),
            branch4=nn.MaxPool2d(3, stride=1, padding=1),
        )
        self.out_channels = out_1x1 + out_3x3 + out_5x5 + in_channels


class InceptionAux(nn.Module):
    """An auxiliary classifier: it sends a gradient into the middle of the network while training.

    Average pool to 4×4, 1×1 unit, fully connected, ReLU, dropout, fully connected. (N, in_channels, H, W) to
    (N, num_classes). The paper pools 5×5 with stride 3, which is 4×4 for its 14×14 maps only.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        unit: Unit = ConvBlock,
        pool: nn.Module | None = None,
        width: int = 128,
        hidden: int = 1024,
        dropout: float = 0.7,
    ):
        self.pool = pool or nn.AvgPool2d(5, stride=3)
        self.conv = unit(in_channels, width, kernel_size=1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(width * 4 * 4, hidden)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.conv(self.pool(x)))  # (N, width·4·4)
        x = self.dropout(self.relu(self.fc1(x)))
        return self.fc2(x)


# ---- The words of a table: layers that learn their in-channels when the network is built ----

SAME, VALID = None, 0  # padding that keeps the grid (at stride 1), and none


class Style(NamedTuple):
    """What the layers of one network have in common.

    unit    builds its convolution units
    width   multiplies all published widths: a network of width 1/4 has the same layers and about 1/16 of the cost
    """

    unit: Unit = ConvBlock
    width: float = 1.0

    def channels(self, published: int) -> int:
        """A published width times `width`. Raises ShapeError if channels would have to be cut."""
        if not isinstance(self.width, (int, float)):
            raise ShapeError(f"width must be a number, got {self.width!r}")
        scaled = float(published * self.width)
        if not scaled.is_integer() or scaled < 1:  # NaN and infinity are no integers
            raise ShapeError(
                f"width {self.width:g} makes {scaled:g} channels of {published}: take one as 0.25, 0.125 or 2"
            )
        return int(scaled)


Layer = Callable[[int, Style], tuple[nn.Module, int]]  # in-channels -> the module, its out-channels


def conv(out: int, kernel: Size, stride: int = 1, padding: int | None = SAME) -> Layer:
    """A convolution unit of `out` channels; a kernel (1, 7) has height 1 and width 7."""

    def build(in_channels: int, style: Style) -> tuple[nn.Module, int]:
        width = style.channels(out)
        return style.unit(
            in_channels, width, kernel_size=kernel, stride=stride, padding=_padding(kernel, padding)
        ), width

    return build


def max_pool(kernel: int, stride: int = 1, padding: int | None = SAME, *, ceil_mode: bool = False) -> Layer:
    """The maximum of each window."""
    cells = _padding(kernel, padding)
    return lambda channels, style: (nn.MaxPool2d(kernel, stride, cells, ceil_mode=ceil_mode), channels)


def avg_pool(kernel: int, stride: int = 1, padding: int | None = SAME, *, count_padding: bool = True) -> Layer:
    """The mean of each window; count_padding as in ops.avg_pool2d."""
    cells = _padding(kernel, padding)
    return lambda channels, style: (nn.AvgPool2d(kernel, stride, cells, count_padding=count_padding), channels)


def branches(*chains: Sequence[Layer]) -> Layer:
    """Lists of layers side by side, as in a paper's figure; their outputs are joined in order.

    A fork inside a branch is `branches` again, as its last layer. The children are branch1, branch2, …
    """

    def build(in_channels: int, style: Style) -> tuple[nn.Branches, int]:
        built = [_chain(chain, in_channels, style) for chain in chains]
        named = {f"branch{i}": module for i, (module, _) in enumerate(built, start=1)}
        return nn.Branches(**named), sum(width for _, width in built)

    return build


class Residual(nn.Module):
    """A module with a shortcut (arXiv:1602.07261, section 3.2), (N, C, H, W) to the same shape.

        y = relu(x + scale · up(branches(x)))

    up      1×1 convolution to the width of x, with bias, without batch norm and ReLU
    scale   0.1 to 0.3: with more, very wide networks die early in training (section 3.3)
    relu    False for the last module of the released networks
    """

    def __init__(self, branches: nn.Module, up: nn.Conv2d, *, scale: float, relu: bool = True):
        self.branches, self.up = branches, up
        self.scale, self.relu = scale, relu

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.up(self.branches(x)) * self.scale
        return ops.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"scale={self.scale}{'' if self.relu else ', relu=False'}"


def residual(scale: float, *chains: Sequence[Layer], relu: bool = True) -> Layer:
    """`branches` with a shortcut: see Residual."""

    def build(in_channels: int, style: Style) -> tuple[nn.Module, int]:
        joined, width = branches(*chains)(in_channels, style)
        return Residual(joined, nn.Conv2d(width, in_channels, 1), scale=scale, relu=relu), in_channels

    return build


def _chain(layers: Sequence[Layer], in_channels: int, style: Style) -> tuple[nn.Module, int]:
    """Layers one after the other; a single one stands for itself."""
    modules, channels = [], in_channels
    for layer in layers:
        module, channels = layer(channels, style)
        modules.append(module)
    return (modules[0] if len(modules) == 1 else nn.Sequential(*modules)), channels


def _padding(kernel: Size, padding: int | None) -> Size:
    if padding is not None:
        return padding
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
