"""Inception-ResNet v1 and v2: Szegedy et al., arXiv:1602.07261, figures 10 to 19, as published and as released."""

from __future__ import annotations

from typing import Any

from inception.models import inception_v3, inception_v4
from inception.models.blocks import VALID, Layer, branches, conv, max_pool, residual
from inception.models.inception_v3 import SIZE, head, unit
from inception.models.inception_v4 import reduction_a
from inception.models.network import Form, Inception, InputSize, Step, glorot
from minigrad import Tensor, nn

# The paper scales residuals by 0.1 to 0.3; these are the released networks'.
SCALE_35, SCALE_17, SCALE_8 = 0.17, 0.10, 0.20


def resnet_a(c: int, d: int) -> Layer:
    """Figures 10 and 16, for 35×35; c and d are the widths of the double 3×3."""
    return residual(
        SCALE_35,
        [conv(32, 1)],
        [conv(32, 1), conv(32, 3)],
        [conv(32, 1), conv(c, 3), conv(d, 3)],
    )


def resnet_b(c1: int, c7: int, d: int) -> Layer:
    """Figures 11 and 17, for 17×17."""
    return residual(
        SCALE_17,
        [conv(c1, 1)],
        [conv(128, 1), conv(c7, (1, 7)), conv(d, (7, 1))],
    )


def resnet_c(c3: int, d: int, *, scale: float = SCALE_8, relu: bool = True) -> Layer:
    """Figures 13 and 19, for 8×8."""
    return residual(
        scale,
        [conv(192, 1)],
        [conv(192, 1), conv(c3, (1, 3)), conv(d, (3, 1))],
        relu=relu,
    )


def reduction_b(b: int, c: int, d: int, padding: int | None = VALID) -> Layer:
    """Figures 12 and 18, 17×17 to 8×8."""
    return branches(
        [conv(256, 1), conv(384, 3, 2, padding)],
        [conv(256, 1), conv(b, 3, 2, padding)],
        [conv(256, 1), conv(c, 3), conv(d, 3, 2, padding)],
        [max_pool(3, 2, padding)],
    )


# ---- v1 ----


def rows_v1() -> list[Step]:
    """Figure 15, with the stem of figure 14."""
    return [
        *inception_v3.stem()[:-1],
        Step("conv4b", conv(256, 3, 2, VALID), 256),
        *(Step(f"resnet_a{i}", resnet_a(32, 32), 256) for i in range(1, 6)),
        Step("reduction_a", reduction_a(192, 192, 256, 384), 896),
        *(Step(f"resnet_b{i}", resnet_b(128, 128, 128), 896) for i in range(1, 11)),
        Step("reduction_b", reduction_b(256, 256, 256), 1792),
        *(Step(f"resnet_c{i}", resnet_c(192, 192), 1792) for i in range(1, 6)),
    ]


# All but the faces' network start as TF-slim's release of v2 does: its scope for this network says nothing of weights.
# (Of the faces' there are two ports: facenet's starts by a truncated normal of 0.1, facenet-pytorch's by PyTorch's
# default, as here.)

V1_PAPER = Form(
    name="inception_resnet_v1",
    about="Inception-ResNet-v1 (arXiv:1602.07261) as published",
    size=InputSize(299, least=75),
    unit=unit,
    steps=rows_v1(),
    dropout=0.2,
    initialise=glorot,
)


class Embedding(nn.Module):
    """What describes a face: fully connected without bias, then batch norm. (N, channels) to (N, features)."""

    def __init__(self, channels: int, features: int = 512):
        self.fc = nn.Linear(channels, features, bias=False)
        self.batchnorm = nn.BatchNorm2d(features, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batchnorm(self.fc(x)[:, :, None, None]).flatten()


V1_FACENET = Form(
    name="inception_resnet_v1_facenet",
    about="Inception-ResNet-v1 (arXiv:1602.07261) as facenet has it: a sixth 8×8 module, 512 numbers for a face",
    size=InputSize(160, least=75),
    unit=unit,
    steps=[*rows_v1(), Step("resnet_c6", resnet_c(192, 192, scale=1.0, relu=False), 1792)],
    dropout=0.6,
    embedding=lambda channels: (Embedding(channels), 512),
)


def embeddings(model: Inception, faces: Tensor) -> Tensor:
    """What facenet compares: the numbers before the classifier, divided by their length. (N, C, H, W) to (N, 512).

    Faces of one person lie close together. Give `model` in evaluation mode.
    """
    x: Any = faces
    for name, layer in model.children():
        if name != "fc1" and name not in model.form.heads.values():
            x = layer(x)
    return x / (x * x).sum(axis=1, keepdims=True).sqrt()


# ---- v2 ----


def rows_v2_paper() -> list[Step]:
    """Figure 15 with the stem of figure 3, five, ten and five modules.

    The figures print widths of 1154 and 2048, but the branches sum to 1152 and 2144, which residual sums need.
    """
    return [
        *inception_v4.stem(),
        *(Step(f"resnet_a{i}", resnet_a(48, 64), 384) for i in range(1, 6)),
        Step("reduction_a", reduction_a(256, 256, 384, 384), 1152),
        *(Step(f"resnet_b{i}", resnet_b(192, 160, 192), 1152) for i in range(1, 11)),
        Step("reduction_b", reduction_b(288, 288, 320), 2144),
        *(Step(f"resnet_c{i}", resnet_c(224, 256), 2144) for i in range(1, 6)),
    ]


def rows_v2(stem: list[Step], padding: int | None = VALID) -> list[Step]:
    """The released network behind a stem of 192 channels: one mixed module, then ten, twenty and ten residual ones."""
    return [
        *stem,
        Step("mixed5b", mixed_5b(), 320),
        *(Step(f"resnet_a{i}", resnet_a(48, 64), 320) for i in range(1, 11)),
        Step("reduction_a", reduction_a(256, 256, 384, 384, padding), 1088),
        *(Step(f"resnet_b{i}", resnet_b(192, 160, 192), 1088) for i in range(1, 21)),
        Step("reduction_b", reduction_b(288, 288, 320, padding), 2080),
        *(Step(f"resnet_c{i}", resnet_c(224, 256), 2080) for i in range(1, 10)),
        Step("resnet_c10", resnet_c(224, 256, scale=1.0, relu=False), 2080),
        Step("conv7b", conv(1536, 1), 1536),
    ]


def mixed_5b() -> Layer:
    """The module of v3 with other widths."""
    return branches(
        [conv(96, 1)],
        [conv(48, 1), conv(64, 5)],
        [conv(64, 1), conv(96, 3), conv(96, 3)],
        [inception_v4.average, conv(64, 1)],
    )


V2_PAPER = Form(
    name="inception_resnet_v2_paper",
    about="Inception-ResNet-v2 (arXiv:1602.07261) as published: 5, 10 and 5 residual modules",
    size=InputSize(299, least=75),
    unit=unit,
    steps=rows_v2_paper(),
    dropout=0.2,
    initialise=glorot,
)

V2 = Form(
    name="inception_resnet_v2",
    about="Inception-ResNet-v2 (arXiv:1602.07261) as released, in TF-slim and timm: 10, 20 and 10 residual modules",
    size=SIZE,
    unit=unit,
    steps=rows_v2(inception_v3.stem()),
    heads={"resnet_b20": "aux"},
    head=head,
    dropout=0.2,
    initialise=glorot,
)

FORMS = [V1_PAPER, V1_FACENET, V2, V2_PAPER]
