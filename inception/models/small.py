"""The family for pictures of 32×32, as CIFAR's: stems that do not shrink them away.

The published stems make 35×35 of 299×299, and 1×1 of 32×32. Here v3, v4 and Inception-ResNet-v2 keep their layers, but
halve the picture once before the modules instead of three times, and pad every convolution and pool: the grids of
the modules are 16, 8 and 4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from inception.models import inception_resnet, inception_v3, inception_v4
from inception.models.blocks import SAME, InceptionAux, InceptionBlock, Style, conv, max_pool
from inception.models.googlenet import HEADS_AFTER, POOL, TABLE_1, GoogLeNetOutput, Row, head_for_any_size, rows
from inception.models.network import Form, InputSize, Step
from minigrad import nn
from minigrad.nn import init
from minigrad.random import Key

# fmt: off
SMALL_TABLE: list[Row | str] = [
    #   name   1×1  r3×3  3×3  r5×5  5×5  pool   out
    Row("3a",   16,   32,  32,   16,   8,    8,   64),
    Row("3b",   24,   32,  48,   16,  12,   12,   96),
    POOL,
    Row("4a",   24,   32,  48,   16,  12,   12,   96),
    Row("4b",   16,   32,  48,   16,  16,   16,   96),
    Row("4c",   16,   32,  48,   16,  16,   16,   96),
    Row("4d",   32,   32,  48,   16,  24,   24,  128),
    POOL,
    Row("5a",   32,   48,  64,   16,  16,   16,  128),
    Row("5b",   32,   48,  64,   16,  16,   16,  128),
]
# fmt: on
SIZE = InputSize(32, least=8)


def small_head(channels: int, classes: int, style: Style) -> nn.Module:
    """An auxiliary classifier of a size that fits the network's."""
    pool = nn.AdaptiveAvgPool2d(4)
    return InceptionAux(
        channels, classes, unit=style.unit, pool=pool, width=style.channels(32), hidden=style.channels(128)
    )


def he_convolutions(path: str, layer: Any, key: Key) -> None:
    """Weights of convolutions normal with variance 2/fan-in; all else PyTorch's default."""
    if isinstance(layer, nn.Conv2d):
        init.he_normal_(layer.weight.data, key.fold("he", path))


SMALL = Form(
    name="googlenet_small",
    about="GoogLeNet (arXiv:1409.4842) in small: the eight narrow modules of the UvA deep-learning tutorial 5",
    size=SIZE,
    steps=rows([Step("conv1", conv(64, 3), 64)], SMALL_TABLE, max_pool(3, 2)),
    heads=HEADS_AFTER,
    head=small_head,
    output=GoogLeNetOutput,
    classes=10,
    initialise=he_convolutions,
)

# A stem of 192 channels on all 32×32 pixels, and two 3×3 for each 5×5.
CIFAR = Form(
    name="googlenet_cifar",
    about="GoogLeNet (arXiv:1409.4842) at full width for 32×32 pictures, the form of pytorch-cifar",
    size=SIZE,
    steps=rows([Step("conv1", conv(192, 3), 192)], TABLE_1, max_pool(3, 2), partial(InceptionBlock, kernels=(3, 3))),
    heads=HEADS_AFTER,
    head=head_for_any_size,
    output=GoogLeNetOutput,
    classes=10,
)


def for_cifar(form: Form, name: str, steps: list[Step]) -> Form:
    """A form with other steps, for ten classes, with heads (if any are asked for) that take any grid."""
    return form._replace(
        name=name,
        about=f"{form.about.partition(')')[0]}) for 32×32 pictures: grids of 16, 8 and 4",
        size=SIZE,
        steps=steps,
        head=inception_v3.head_for_any_size,
        aux_logits=False,
        classes=10,
    )


FORMS = [
    SMALL,
    CIFAR,
    for_cifar(
        inception_v3.V3,
        "inception_v3_cifar",
        inception_v3.rows(inception_v3.stem(strides=(1, 1), padding=SAME), SAME),
    ),
    for_cifar(
        inception_v4.V4,
        "inception_v4_cifar",
        inception_v4.rows(inception_v4.stem(strides=(1, 1), padding=SAME), SAME),
    ),
    for_cifar(
        inception_resnet.V2,
        "inception_resnet_v2_cifar",
        inception_resnet.rows_v2(inception_v3.stem(strides=(1, 1), padding=SAME), SAME),
    ),
]
