"""Inception v2, BN-Inception: Ioffe, Szegedy, Batch normalization, arXiv:1502.03167, figure 5.

GoogLeNet with batch norm, two 3×3 in place of the 5×5, and two modules that halve the grid themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from inception.models.blocks import (
    VALID,
    ConvBlock,
    Layer,
    Style,
    avg_pool,
    branches,
    conv,
    max_pool,
)
from inception.models.network import Form, InputSize, Step, he
from minigrad import nn
from minigrad.nn import init
from minigrad.random import Key


class Row(NamedTuple):
    """One module, as a row of figure 5: output channels of each branch."""

    name: str
    c1: int  # 1×1; 0 in the modules of stride 2, which have no such branch
    r3: int  # 1×1 reduction before the 3×3
    c3: int
    rd: int  # 1×1 reduction before the double 3×3
    cd: int  # both of the double 3×3
    pool: str  # avg or max
    proj: int  # 1×1 projection after the pool; 0: stride 2, the pool passes everything on
    out: int

    def step(self, average: Layer) -> Step:
        """The module; `average` is its pool where that is avg."""
        if self.proj == 0:
            layer = branches(
                [conv(self.r3, 1), conv(self.c3, 3, 2)],
                [conv(self.rd, 1), conv(self.cd, 3), conv(self.cd, 3, 2)],
                [max_pool(3, 2, VALID, ceil_mode=True)],
            )
        else:
            layer = branches(
                [conv(self.c1, 1)],
                [conv(self.r3, 1), conv(self.c3, 3)],
                [conv(self.rd, 1), conv(self.cd, 3), conv(self.cd, 3)],
                [average if self.pool == "avg" else max_pool(3), conv(self.proj, 1)],
            )
        return Step(f"inception{self.name}", layer, self.out)


# fmt: off
CAFFE_TABLE = [
    #   name   1×1  r3×3  3×3  r3×3² 3×3²  pool   proj   out
    Row("3a",   64,   64,  64,   64,   96, "avg",   32,  256),
    Row("3b",   64,   64,  96,   64,   96, "avg",   64,  320),
    Row("3c",    0,  128, 160,   64,   96, "max",    0,  576),
    Row("4a",  224,   64,  96,   96,  128, "avg",  128,  576),
    Row("4b",  192,   96, 128,   96,  128, "avg",  128,  576),
    Row("4c",  160,  128, 160,  128,  160, "avg",  128,  608),
    Row("4d",   96,  128, 192,  160,  192, "avg",  128,  608),
    Row("4e",    0,  128, 192,  192,  256, "max",    0, 1056),
    Row("5a",  352,  192, 320,  160,  224, "avg",  128, 1024),
    Row("5b",  352,  192, 320,  192,  224, "max",  128, 1024),
]
# Figure 5 prints 128 as projection of 4c and 4d and 576 as their output, which do not go together. The Caffe port
# keeps the first, TF-slim the second.
SLIM_TABLE = [
    *CAFFE_TABLE[:5],
    Row("4c",  160,  128, 160,  128,  160, "avg",   96,  576),
    Row("4d",   96,  128, 192,  160,  192, "avg",   96,  576),
    Row("4e",    0,  128, 192,  192,  256, "max",    0, 1024),
    *CAFFE_TABLE[8:],
]
# fmt: on


def separable(out: int, kernel: int, stride: int, multiplier: int) -> Layer:
    """`multiplier` filters for each channel by itself, then a 1×1 unit over all of them; nothing in between."""

    def build(in_channels: int, style: Style) -> tuple[nn.Module, int]:
        between = in_channels * multiplier
        depthwise = nn.Conv2d(
            in_channels, between, kernel, stride=stride, padding=kernel // 2, groups=in_channels, bias=False
        )
        pointwise, width = conv(out, 1)(between, style)
        return nn.Sequential(depthwise, pointwise), width

    return build


def rows(first: Layer, table: list[Row], average: Layer) -> list[Step]:
    """The stem with its first layer, then the modules. Stride 2 is in the modules 3c and 4e."""
    pool = max_pool(3, 2, VALID, ceil_mode=True)
    return [
        Step("conv1", first, 64),
        Step("maxpool1", pool, 64),
        Step("conv2", conv(64, 1), 64),
        Step("conv3", conv(192, 3), 192),
        Step("maxpool2", pool, 192),
        *(row.step(average) for row in table),
    ]


# 3c and 4e join padded convolutions and an unpadded pool, which agree on even grids only.
SIZE = InputSize(224, least=32, multiple=32)

CAFFE = Form(
    name="bn_inception",
    about="BN-Inception (arXiv:1502.03167) as the Caffe port has it: widths up to 1056, biases",
    size=SIZE,
    steps=rows(conv(64, 7, 2), CAFFE_TABLE, avg_pool(3)),
)


def slim(path: str, layer: Any, key: Key) -> None:
    """TF-slim's: He, but the first two layers, the reductions and the pool projections by hand (truncated normal)."""
    std = None
    if path.startswith("conv1."):
        std = 1.0
    elif path.endswith(".0.conv"):  # a reduction: the first of a branch's units
        std = 0.09
    elif path == "conv2.conv" or path.endswith("branch4.1.conv"):  # or the projection behind a pool
        std = 0.1
    if std is None:
        he(path, layer, key)
    else:
        init.truncated_normal_(layer.weight.data, key.fold("slim", path), std)


# slim's batch norm has no gamma (the next convolution can do its work) and moves its running statistics by 0.0003 a
# step, for runs of millions of steps; its first layer has a bias in place of batch norm, as its scope speaks of plain
# convolutions alone. Here gamma and the first batch norm are the paper's, and momentum that of the other networks.
# TensorFlow pads strided convolutions on one side more than on the other, symmetric padding shifts them by one pixel.
SLIM = Form(
    name="inception_v2",
    about="Inception v2 (arXiv:1502.03167) with TF-slim's widths: outputs as in figure 5, separable first layer",
    size=SIZE,
    unit=partial(ConvBlock, bias=False, eps=1e-3),
    steps=rows(separable(64, 7, 2, multiplier=8), SLIM_TABLE, avg_pool(3, count_padding=False)),
    dropout=0.2,
    initialise=slim,
)

FORMS = [CAFFE, SLIM]
