"""What the networks are made of: the four classes of the article, and the rows of their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from minigrad import Tensor, nn, ops
from minigrad.errors import ShapeError


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
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias),
            nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum, relu=True),
        )


class Unit(Protocol):
    """Something that builds convolution units: ConvBlock itself, or ConvBlock with other defaults."""

    def __call__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> nn.Module: ...


class InceptionBlock(nn.Branches):
    """The Inception module with dimension reduction (figure 2b of arXiv:1409.4842).

        1×1  |  1×1 reduce → 3×3  |  1×1 reduce → 5×5  |  3×3 max pool → 1×1         joined along the channels

    The six widths stand in the order of the paper's table. (N, in_channels, H, W) to (N, out_channels, H, W).
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
    ):
        super().__init__()
        self.branch1 = unit(in_channels, out_1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            unit(in_channels, red_3x3, kernel_size=1),
            unit(red_3x3, out_3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            unit(in_channels, red_5x5, kernel_size=1),
            unit(red_5x5, out_5x5, kernel_size=5, padding=2),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            unit(in_channels, out_1x1pool, kernel_size=1),
        )
        self.out_channels = out_1x1 + out_3x3 + out_5x5 + out_1x1pool

    def forward(self, x: Tensor) -> Tensor:
        """As Branches, but for the three 1×1 units that see x itself: together they read it once."""
        units = [unit for unit in (self.branch1, self.branch2[0], self.branch3[0]) if isinstance(unit, nn.ConvNormReLU)]
        if len(units) < 3:
            return super().forward(x)
        one, three, five = nn.together(x, *units)
        return ops.concat([one, self.branch2[1](three), self.branch3[1](five), self.branch4(x)])


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


class Row(NamedTuple):
    """One Inception module, as a row of Table 1 of arXiv:1409.4842: output channels of each branch."""

    name: str
    c1: int  # 1×1
    r3: int  # 1×1 reduction before the 3×3
    c3: int
    r5: int  # 1×1 reduction before the 5×5
    c5: int
    pool: int  # 1×1 projection after the max pool
    out: int  # of all branches together: asserted when the module is built

    def build(self, in_channels: int, unit: Unit) -> InceptionBlock:
        block = InceptionBlock(in_channels, *self[1:7], unit=unit)
        assert block.out_channels == self.out, f"row {self.name}: the branches sum to {block.out_channels}"
        return block


class InputSize(NamedTuple):
    """The pictures a network takes: from `least` pixels a side, or of `least` pixels only."""

    least: int
    only: bool = False

    def check(self, model: str, x: Tensor) -> None:
        """Raise ShapeError in one sentence if x is no batch of such pictures."""
        if x.ndim != 4:
            raise ShapeError(f"{model} takes a batch of pictures (N, C, H, W), got shape {x.shape}")
        h, w = x.shape[2:]
        if self.only and (h, w) != (self.least, self.least):
            raise ShapeError(f"{model} takes {self.least}×{self.least} pictures only, got {h}×{w}: resize them")
        if min(h, w) < self.least:
            raise ShapeError(f"{model} takes pictures from {self.least}×{self.least} up, got {h}×{w}: enlarge them")


Pool = Callable[[], nn.Module]
