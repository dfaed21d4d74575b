"""GoogLeNet (Inception v1): Szegedy et al., Going deeper with convolutions, arXiv:1409.4842.

`python -m inception.models.googlenet` runs the article's closing check: three random pictures through the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from inception.models.blocks import (
    VALID,
    ConvBlock,
    ConvReLU,
    InceptionAux,
    InceptionBlock,
    Layer,
    NaiveInceptionBlock,
    Style,
    conv,
    max_pool,
)
from inception.models.network import Form, Inception, InputSize, Step
from minigrad import Tensor, nn, summary
from minigrad.nn import init
from minigrad.random import Key


class Row(NamedTuple):
    """One Inception module, as a row of Table 1: output channels of each branch."""

    name: str
    c1: int  # 1×1
    r3: int  # 1×1 reduction before the 3×3
    c3: int
    r5: int  # 1×1 reduction before the 5×5
    c5: int
    pool: int  # 1×1 projection after the max pool
    out: int  # of all branches together


POOL = "pool"  # between two stages
# fmt: off
TABLE_1: list[Row | str] = [
    #   name   1×1  r3×3  3×3  r5×5  5×5  pool   out
    Row("3a",   64,   96, 128,   16,  32,   32,  256),
    Row("3b",  128,  128, 192,   32,  96,   64,  480),
    POOL,
    Row("4a",  192,   96, 208,   16,  48,   64,  512),
    Row("4b",  160,  112, 224,   24,  64,   64,  512),
    Row("4c",  128,  128, 256,   24,  64,   64,  512),
    Row("4d",  112,  144, 288,   32,  64,   64,  528),
    Row("4e",  256,  160, 320,   32, 128,  128,  832),
    POOL,
    Row("5a",  256,  160, 320,   32, 128,  128,  832),
    Row("5b",  384,  192, 384,   48, 128,  128, 1024),
]
# fmt: on
HEADS_AFTER = {"inception4a": "aux1", "inception4d": "aux2"}


def rows(
    stem: Sequence[Step],
    table: Sequence[Row | str],
    pool: Layer,
    block: Callable[..., nn.Module] = InceptionBlock,
) -> list[Step]:
    """A stem, then a module for each row of a table, with `pool` between the stages. Pools are numbered through."""
    steps = list(stem)
    for row in table:
        if isinstance(row, Row):
            steps.append(Step(f"inception{row.name}", _module(row, block), row.out))
        else:
            number = 1 + sum(step.name.startswith("maxpool") for step in steps)
            steps.append(Step(f"maxpool{number}", pool, steps[-1].out))
    return steps


def _module(row: Row, block: Callable[..., Any]) -> Layer:
    def build(in_channels: int, style: Style) -> tuple[nn.Module, int]:
        module = block(in_channels, *map(style.channels, row[1:7]), unit=style.unit)
        return module, module.out_channels

    return build


class GoogLeNetOutput(NamedTuple):
    """What the network returns while it trains with auxiliary heads: three times logits (N, num_classes)."""

    aux1: Tensor
    aux2: Tensor
    logits: Tensor


def head(channels: int, classes: int, style: Style, *, pool: nn.Module | None = None) -> nn.Module:
    """The auxiliary classifier of the paper, section 5."""
    return InceptionAux(
        channels, classes, unit=style.unit, pool=pool, width=style.channels(128), hidden=style.channels(1024)
    )


def head_for_any_size(channels: int, classes: int, style: Style) -> nn.Module:
    """The same behind an average pool that makes 4×4 of every grid."""
    return head(channels, classes, style, pool=nn.AdaptiveAvgPool2d(4))


padded_pool, ceil_pool = max_pool(3, 2), max_pool(3, 2, VALID, ceil_mode=True)
paper_stem = [
    Step("conv1", conv(64, 7, 2), 64),
    Step("maxpool1", ceil_pool, 64),
    Step("conv2", conv(64, 1), 64),
    Step("conv3", conv(192, 3), 192),
    Step("maxpool2", ceil_pool, 192),
]


def lrn(channels: int, style: Style) -> tuple[nn.Module, int]:
    """Local response normalisation with the constants of the Caffe model; the paper gives none."""
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0), channels


# Biases in front of batch norm, no 1×1 in the stem, padded pools.
ARTICLE = Form(
    name="googlenet",
    about="GoogLeNet (arXiv:1409.4842) as from-scratch articles list it: batch norm and biases, 224×224 only",
    size=InputSize(224),
    steps=rows(
        [
            Step("conv1", conv(64, 7, 2), 64),
            Step("maxpool1", padded_pool, 64),
            Step("conv2", conv(192, 3), 192),
            Step("maxpool2", padded_pool, 192),
        ],
        TABLE_1,
        padded_pool,
    ),
    heads=HEADS_AFTER,
    head=head,
    aux_logits=True,
    output=GoogLeNetOutput,
    average=partial(nn.AvgPool2d, 7, stride=1),
    dropout=0.4,
)


def caffe(path: str, layer: Any, key: Key) -> None:
    """Caffe's "xavier" weights; biases 0.2 (no ReLU starts dead), and 0 in the three classifiers."""
    init.xavier_uniform_(layer.weight.data, key.fold("xavier", path))
    classifier = path == "fc1" or path.endswith(".fc2")
    layer.bias.data[...] = 0.0 if classifier else 0.2


# The paper's own network: biases, no batch norm.
PAPER = ARTICLE._replace(
    name="googlenet_paper",
    about="GoogLeNet (arXiv:1409.4842) as published, the BVLC Caffe model: LRN, no batch norm, 224×224 only",
    unit=ConvReLU,
    steps=rows(
        [
            *paper_stem[:2],
            Step("norm1", lrn, 64),
            *paper_stem[2:4],
            Step("norm2", lrn, 192),
            paper_stem[4],
        ],
        TABLE_1,
        ceil_pool,
    ),
    initialise=caffe,
)

# The 22 weight layers of the paper's table with batch norm instead of biases and LRN.
BATCH_NORM = Form(
    name="googlenet_bn",
    about="GoogLeNet (arXiv:1409.4842) with batch norm instead of biases and LRN, any size from 32",
    size=InputSize(224, least=32),
    unit=partial(ConvBlock, bias=False, eps=1e-3),
    steps=rows(paper_stem, TABLE_1, ceil_pool),
    heads=HEADS_AFTER,
    head=head_for_any_size,
    aux_logits=True,
    output=GoogLeNetOutput,
    dropout=0.4,
)


def torchvision(path: str, layer: Any, key: Key) -> None:
    """Weights normal with standard deviation 0.01; linear biases stay PyTorch's default."""
    init.normal_(layer.weight.data, key.fold("normal", path), 0.01)


def last_pool_2x2(steps: list[Step]) -> list[Step]:
    """The steps with a 2×2 pool before 5a."""
    return [step._replace(layer=max_pool(2, 2, VALID, ceil_mode=True)) if step.name == "maxpool4" else step
            for step in steps]  # fmt: skip


# TF-slim's port took a 3×3 for the 5×5, and the published weights keep it.
TORCHVISION = BATCH_NORM._replace(
    name="googlenet_torchvision",
    about="GoogLeNet (arXiv:1409.4842) as torchvision has it, for its weights: 3×3 in the 5×5 branch",
    size=InputSize(224, least=15),
    steps=last_pool_2x2(rows(paper_stem, TABLE_1, ceil_pool, partial(InceptionBlock, kernels=(3,)))),
    dropout=0.2,
    initialise=torchvision,
)


def naive(in_channels: int, c1: int, r3: int, c3: int, r5: int, c5: int, pool: int, *, unit: Any) -> nn.Module:
    """The naive module at the widths of a row of Table 1, whose r3, r5 and pool it has no use for.

    So its sums are its own: the pool passes all channels on.
    """
    return NaiveInceptionBlock(in_channels, c1, c3, c5, unit=unit)


# Two modules show what the reductions are for: 2.2 M weights and 1.7 G multiply-adds where 3a and 3b have
# 0.55 M and 0.43 G. All nine would come to 97.5 M weights and 12.6 G.
NAIVE = Form(
    name="googlenet_naive",
    about="3a and 3b of GoogLeNet as naive modules (arXiv:1409.4842, figure 2a), to compare with figure 2b",
    size=InputSize(224, least=7),
    unit=partial(ConvBlock, bias=False, eps=1e-3),
    steps=rows(
        paper_stem,
        [Row("3a", 64, 96, 128, 16, 32, 32, out=416), Row("3b", 128, 128, 192, 32, 96, 64, out=832)],
        ceil_pool,
        naive,
    ),
    dropout=0.4,
)

FORMS = [ARTICLE, PAPER, BATCH_NORM, TORCHVISION, NAIVE]


class GoogLeNet(Inception):
    """The article's class: two auxiliary heads, after 4a and 4d, run in training only. See Inception."""

    def __init__(self, aux_logits: bool = True, num_classes: int = 1000, *, form: Form = ARTICLE, **options: Any):
        super().__init__(form, num_classes=num_classes, aux_logits=aux_logits, **options)


# ---- Table 1 of the paper beside the computed numbers ----


class Line(NamedTuple):
    """One row of Table 1: what it states, and what its own channel columns come to."""

    name: str
    stated_k: float  # parameters / 1024
    weights: int  # without biases
    stated_m: float  # multiply-adds / 10⁶
    multiply_adds: int
    remark: str  # why they differ; empty where they agree

    @property
    def parameters_agree(self) -> bool:
        """Within one of the units in which the paper prints."""
        return abs(self.stated_k - self.weights / 1024) <= 1

    @property
    def operations_agree(self) -> bool:
        """Within one of the units in which the paper prints."""
        return abs(self.stated_m - self.multiply_adds / 1e6) <= 1


# fmt: off
_STATED: dict[str, tuple[list[str], float, float]] = {
    #             our layers           params/K  ops/M
    "conv1":     (["conv1"],              2.7,    34),
    "conv2":     (["conv2", "conv3"],   112,     360),
    "3a":        (["inception3a"],      159,     128),
    "3b":        (["inception3b"],      380,     304),
    "4a":        (["inception4a"],      364,      73),
    "4b":        (["inception4b"],      437,      88),
    "4c":        (["inception4c"],      463,     100),
    "4d":        (["inception4d"],      580,     119),
    "4e":        (["inception4e"],      840,     170),
    "5a":        (["inception5a"],     1072,      54),
    "5b":        (["inception5b"],     1388,      71),
    "linear":    (["fc1"],             1000,       1),
}
# fmt: on
_REMARKS = {
    "conv1": "fits a separable 7×7: depthwise with multiplier 8 (1,176 weights), then 1×1 24→64 (1,536): 2.65K, 34.0M",
    "5a": "the two stated numbers fit each other, but not the channel columns, which every implementation follows",
}


def table_1_beside_ours() -> list[Line]:
    """Table 1 with the numbers of `googlenet_paper`, row by row, computed by running it.

    Seven of the twelve rows state parameters that do not follow from the channels in the same row, two of them
    operations that do not; the remarks say what they fit.
    """
    model = Inception(PAPER, aux_logits=False)
    costs = {row.path: row.multiply_adds for row in summary(model, (3, 224, 224), depth=1).rows}
    weights = {
        name: sum(parameter.size for parameter in layer.parameters() if parameter.ndim > 1)
        for name, layer in model.children()
    }
    lines = []
    for name, (layers, stated_k, stated_m) in _STATED.items():
        line = Line(name, stated_k, sum(map(weights.__getitem__, layers)), stated_m, sum(costs[i] for i in layers), "")
        if not line.parameters_agree:
            other = "the stated operations fit the channel columns, the stated parameters do not"
            line = line._replace(remark=_REMARKS.get(name, other))
        lines.append(line)
    return lines


if __name__ == "__main__":
    from minigrad import no_grad
    from minigrad.random import normal

    pictures = Tensor(normal(Key(0), (3, 3, 224, 224)).astype("float32"))
    with no_grad():
        for name, logits in GoogLeNet(aux_logits=True, num_classes=1000)(pictures)._asdict().items():
            print(f"{name}: {logits.shape}")
