"""Inception v4: Szegedy et al., Inception-v4, Inception-ResNet and the impact of residual connections on learning,
arXiv:1602.07261, figures 3 to 9. Where figures and the authors' code differ in the order of 1×7 and 7×1, the code."""

from __future__ import annotations

from typing import Any

from inception.models.blocks import VALID, Layer, avg_pool, branches, conv, max_pool
from inception.models.inception_v3 import SIZE, head, unit
from inception.models.network import Form, Step, glorot, he
from minigrad import nn
from minigrad.random import Key

average = avg_pool(3, count_padding=False)


def stem(*, strides: tuple[int, int] = (2, 2), padding: int | None = VALID) -> list[Step]:
    """Figure 3: 299×299×3 to 35×35×384; also that of the paper's Inception-ResNet-v2.

    strides   of the first convolution and of the last fork
    """
    first, last = strides
    return [
        Step("conv1a", conv(32, 3, first, padding), 32),
        Step("conv2a", conv(32, 3, 1, padding), 32),
        Step("conv2b", conv(64, 3), 64),
        Step("mixed3a", branches([max_pool(3, 2, padding)], [conv(96, 3, 2, padding)]), 160),
        Step(
            "mixed4a",
            branches(
                [conv(64, 1), conv(96, 3, 1, padding)],
                [conv(64, 1), conv(64, (1, 7)), conv(64, (7, 1)), conv(96, 3, 1, padding)],
            ),
            192,
        ),
        Step("mixed5a", branches([conv(192, 3, last, padding)], [max_pool(3, last, padding)]), 384),
    ]


def inception_a() -> Layer:
    """Figure 4, for 35×35."""
    return branches(
        [conv(96, 1)],
        [conv(64, 1), conv(96, 3)],
        [conv(64, 1), conv(96, 3), conv(96, 3)],
        [average, conv(96, 1)],
    )


def reduction_a(k: int, l: int, m: int, n: int, padding: int | None = VALID) -> Layer:  # noqa: E741 (Table 1's names)
    """Figure 7, 35×35 to 17×17; Table 1 has k, l, m, n for each network of the paper."""
    return branches(
        [conv(n, 3, 2, padding)],
        [conv(k, 1), conv(l, 3), conv(m, 3, 2, padding)],
        [max_pool(3, 2, padding)],
    )


def inception_b() -> Layer:
    """Figure 5, for 17×17."""
    return branches(
        [conv(384, 1)],
        [conv(192, 1), conv(224, (1, 7)), conv(256, (7, 1))],
        [conv(192, 1), conv(192, (7, 1)), conv(224, (1, 7)), conv(224, (7, 1)), conv(256, (1, 7))],
        [average, conv(128, 1)],
    )


def reduction_b(padding: int | None = VALID) -> Layer:
    """Figure 8, 17×17 to 8×8."""
    return branches(
        [conv(192, 1), conv(192, 3, 2, padding)],
        [conv(256, 1), conv(256, (1, 7)), conv(320, (7, 1)), conv(320, 3, 2, padding)],
        [max_pool(3, 2, padding)],
    )


def inception_c() -> Layer:
    """Figure 6, for 8×8."""
    fork = branches([conv(256, (1, 3))], [conv(256, (3, 1))])
    return branches(
        [conv(256, 1)],
        [conv(384, 1), fork],
        [conv(384, 1), conv(448, (3, 1)), conv(512, (1, 3)), fork],
        [average, conv(256, 1)],
    )


def rows(stem: list[Step], padding: int | None = VALID) -> list[Step]:
    """Figure 9: the network behind a stem of 384 channels."""
    return [
        *stem,
        *(Step(f"inception_a{i}", inception_a(), 384) for i in range(1, 5)),
        Step("reduction_a", reduction_a(192, 224, 256, 384, padding), 1024),
        *(Step(f"inception_b{i}", inception_b(), 1024) for i in range(1, 8)),
        Step("reduction_b", reduction_b(padding), 1536),
        *(Step(f"inception_c{i}", inception_c(), 1536) for i in range(1, 4)),
    ]


def slim(path: str, layer: Any, key: Key) -> None:
    """TF-slim's: its scope for Inception tells convolutions alone how to start."""
    (glorot if isinstance(layer, nn.Linear) else he)(path, layer, key)


# The auxiliary head is TF-slim's; the paper mentions none for this network.
V4 = Form(
    name="inception_v4",
    about="Inception v4 (arXiv:1602.07261), the network of TF-slim and timm",
    size=SIZE,
    unit=unit,
    steps=rows(stem()),
    heads={"inception_b7": "aux"},
    head=head,
    dropout=0.2,
    initialise=slim,
)

FORMS = [V4]
