"""Inception v3: Szegedy et al., Rethinking the Inception architecture, arXiv:1512.00567, with torchvision's details.

Convolutions are factorised: 5×5 into two 3×3, 7×7 into 1×7 and 7×1, 3×3 into 1×3 beside 3×1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from inception.models.blocks import (
    VALID,
    ConvBlock,
    Layer,
    Style,
    Unit,
    avg_pool,
    branches,
    conv,
    max_pool,
)
from inception.models.network import Form, InputSize, Step
from minigrad import Tensor, nn
from minigrad.nn import init
from minigrad.random import Key

average = avg_pool(3)


def stem(*, strides: tuple[int, int] = (2, 2), padding: int | None = VALID) -> list[Step]:
    """299×299×3 to 35×35×192; also that of the released Inception-ResNet-v2.

    strides   of the first convolution and of the second pool
    """
    first, last = strides
    return [
        Step("conv1a", conv(32, 3, first, padding), 32),
        Step("conv2a", conv(32, 3, 1, padding), 32),
        Step("conv2b", conv(64, 3), 64),
        Step("maxpool3a", max_pool(3, 2, padding), 64),
        Step("conv3b", conv(80, 1), 80),
        Step("conv4a", conv(192, 3, 1, padding), 192),
        Step("maxpool5a", max_pool(3, last, padding), 192),
    ]


def module_35(pool: int) -> Layer:
    """Figure 5, but one branch has kept its 5×5. The widths are fixed but for the projection after the pool."""
    return branches(
        [conv(64, 1)],
        [conv(48, 1), conv(64, 5)],
        [conv(64, 1), conv(96, 3), conv(96, 3)],
        [average, conv(pool, 1)],
    )


def reduction_35(padding: int | None = VALID) -> Layer:
    """Figure 10: the grid halves while the filters grow, without a bottleneck."""
    return branches(
        [conv(384, 3, 2, padding)],
        [conv(64, 1), conv(96, 3), conv(96, 3, 2, padding)],
        [max_pool(3, 2, padding)],
    )


def module_17(c7: int) -> Layer:
    """Figure 6 with n = 7: each 7×7 is a 1×7 and a 7×1. c7 is the width inside."""
    return branches(
        [conv(192, 1)],
        [conv(c7, 1), conv(c7, (1, 7)), conv(192, (7, 1))],
        [conv(c7, 1), conv(c7, (7, 1)), conv(c7, (1, 7)), conv(c7, (7, 1)), conv(192, (1, 7))],
        [average, conv(192, 1)],
    )


def reduction_17(padding: int | None = VALID) -> Layer:
    """The second reduction."""
    return branches(
        [conv(192, 1), conv(320, 3, 2, padding)],
        [conv(192, 1), conv(192, (1, 7)), conv(192, (7, 1)), conv(192, 3, 2, padding)],
        [max_pool(3, 2, padding)],
    )


def module_8() -> Layer:
    """Figure 7: the branches fork at their ends, for the widest outputs of the network."""
    fork = branches([conv(384, (1, 3))], [conv(384, (3, 1))])
    return branches(
        [conv(320, 1)],
        [conv(384, 1), fork],
        [conv(448, 1), conv(384, 3), fork],
        [average, conv(192, 1)],
    )


def rows(stem: list[Step], padding: int | None = VALID) -> list[Step]:
    """The network behind any stem of 192 channels."""
    return [
        *stem,
        Step("mixed5b", module_35(pool=32), 256),
        Step("mixed5c", module_35(pool=64), 288),
        Step("mixed5d", module_35(pool=64), 288),
        Step("mixed6a", reduction_35(padding), 768),
        Step("mixed6b", module_17(c7=128), 768),
        Step("mixed6c", module_17(c7=160), 768),
        Step("mixed6d", module_17(c7=160), 768),
        Step("mixed6e", module_17(c7=192), 768),
        Step("mixed7a", reduction_17(padding), 1280),
        Step("mixed7b", module_8(), 2048),
        Step("mixed7c", module_8(), 2048),
    ]


class FactorisedAux(nn.Module):
    """The auxiliary classifier of v3 and of what came after it, with batch norm (section 4).

    Average pool to 5×5, 1×1 unit, 5×5 unit to one pixel, fully connected. (N, in_channels, 17, 17) to
    (N, num_classes); with another `pool` from any grid.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        unit: Unit,
        pool: nn.Module | None = None,
        width: int = 128,
        hidden: int = 768,
    ):
        self.pool = pool or nn.AvgPool2d(5, stride=3)
        self.conv0 = unit(in_channels, width, kernel_size=1)
        self.conv1 = unit(width, hidden, kernel_size=5)
        self.average = nn.AdaptiveAvgPool2d(1)  # of what is left where pictures are larger than published
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.conv1(self.conv0(self.pool(x))))  # (N, hidden, 1, 1)
        return self.fc(self.flatten(x))


def head(channels: int, classes: int, style: Style, *, pool: nn.Module | None = None) -> nn.Module:
    """The auxiliary classifier at the widths of a network's style."""
    return FactorisedAux(
        channels, classes, unit=style.unit, pool=pool, width=style.channels(128), hidden=style.channels(768)
    )


def head_for_any_size(channels: int, classes: int, style: Style) -> nn.Module:
    """The same behind an average pool that makes 5×5 of every grid."""
    return head(channels, classes, style, pool=nn.AdaptiveAvgPool2d(5))


def torchvision(path: str, layer: Any, key: Key) -> None:
    """Weights normal with standard deviation 0.1, of the head's classifier 0.001; linear biases as built."""
    init.normal_(layer.weight.data, key.fold("normal", path), 0.001 if path == "aux.fc" else 0.1)


unit = partial(ConvBlock, bias=False, eps=1e-3)  # of this network and of all that came after it
SIZE = InputSize(299, least=75, least_with_heads=299)  # the head's 5×5 needs a grid of 17 cells

V3 = Form(
    name="inception_v3",
    about="Inception v3 (arXiv:1512.00567) as torchvision has it",
    size=SIZE,
    unit=unit,
    steps=rows(stem()),
    heads={"mixed6e": "aux"},
    head=head,
    aux_logits=True,
    dropout=0.5,
    initialise=torchvision,
)

FORMS = [V3]
