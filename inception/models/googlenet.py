"""GoogLeNet (Inception v1): Szegedy et al., Going deeper with convolutions, arXiv:1409.4842.

`python -m inception.models.googlenet` runs the article's closing check: three random pictures through the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from inception.models.blocks import ConvBlock, InceptionAux, InputSize, Pool, Row, Unit
from minigrad import Tensor, nn
from minigrad.errors import ShapeError

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
# The UvA deep-learning tutorial 5, for pictures of 32×32.
SMALL_TABLE: list[Row | str] = [
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
HEADS_AFTER = {"4a": "aux1", "4d": "aux2"}


class Form(NamedTuple):
    """What distinguishes the published forms of the network; the rest is `GoogLeNet`."""

    name: str
    size: InputSize
    unit: Unit  # convolution, batch norm, ReLU
    stem: Callable[[int, Unit], dict[str, nn.Module]]
    stem_width: int
    table: list[Row | str]
    pool: Pool  # between the stages
    head: Callable[..., nn.Module]
    average: Pool  # before the classifier
    dropout: float


class GoogLeNetOutput(NamedTuple):
    """What the network returns while it trains with auxiliary heads: three times logits (N, num_classes)."""

    aux1: Tensor
    aux2: Tensor
    logits: Tensor


def article_stem(in_channels: int, unit: Unit) -> dict[str, nn.Module]:
    return {
        "conv1": unit(in_channels, 64, kernel_size=7, stride=2, padding=3),
        "maxpool1": nn.MaxPool2d(3, stride=2, padding=1),
        "conv2": unit(64, 192, kernel_size=3, padding=1),
        "maxpool2": nn.MaxPool2d(3, stride=2, padding=1),
    }


def paper_stem(in_channels: int, unit: Unit) -> dict[str, nn.Module]:
    return {
        "conv1": unit(in_channels, 64, kernel_size=7, stride=2, padding=3),
        "maxpool1": nn.MaxPool2d(3, stride=2, ceil_mode=True),
        "conv2": unit(64, 64, kernel_size=1),
        "conv3": unit(64, 192, kernel_size=3, padding=1),
        "maxpool2": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    }


def small_stem(in_channels: int, unit: Unit) -> dict[str, nn.Module]:
    return {"conv1": unit(in_channels, 64, kernel_size=3, padding=1)}


# The article's listing exactly: biases in front of batch norm, no 1×1 in the stem, padded pools, 224×224 only.
ARTICLE = Form(
    name="googlenet",
    size=InputSize(224, only=True),
    unit=ConvBlock,
    stem=article_stem,
    stem_width=192,
    table=TABLE_1,
    pool=partial(nn.MaxPool2d, 3, stride=2, padding=1),
    head=InceptionAux,
    average=partial(nn.AvgPool2d, 7, stride=1),
    dropout=0.4,
)

# The 22 weight layers of the paper's table with batch norm instead of biases and LRN, for any size from 32 up.
BATCH_NORM = Form(
    name="googlenet_bn",
    size=InputSize(32),
    unit=partial(ConvBlock, bias=False, eps=1e-3),
    stem=paper_stem,
    stem_width=192,
    table=TABLE_1,
    pool=partial(nn.MaxPool2d, 3, stride=2, ceil_mode=True),
    head=lambda *args, **options: InceptionAux(*args, pool=nn.AdaptiveAvgPool2d(4), **options),
    average=partial(nn.AdaptiveAvgPool2d, 1),
    dropout=0.4,
)

# Eight narrow modules on 32×32 pictures.
SMALL = Form(
    name="googlenet_small",
    size=InputSize(8),
    unit=ConvBlock,
    stem=small_stem,
    stem_width=64,
    table=SMALL_TABLE,
    pool=partial(nn.MaxPool2d, 3, stride=2, padding=1),
    head=lambda *args, **options: InceptionAux(*args, pool=nn.AdaptiveAvgPool2d(4), width=32, hidden=128, **options),
    average=partial(nn.AdaptiveAvgPool2d, 1),
    dropout=0.0,
)


class GoogLeNet(nn.Module):
    """Stem, nine Inception modules in three stages with max pools between, mean over all pixels, classifier.

    aux_logits    two auxiliary heads, after 4a and 4d; they run in training only
    num_classes   outputs of the classifier and the heads
    form          which published form; the article's by default
    in_channels   3 for colour pictures
    dropout       before the classifier; None is the form's own

    Returns logits (N, num_classes); in training with heads a GoogLeNetOutput (aux1, aux2, logits).
    Raises ShapeError for pictures of a size that the form does not take.
    """

    def __init__(
        self,
        aux_logits: bool = True,
        num_classes: int = 1000,
        *,
        form: Form = ARTICLE,
        in_channels: int = 3,
        dropout: float | None = None,
    ):
        if num_classes < 1:
            raise ShapeError(f"{form.name}: num_classes must be at least 1, got {num_classes}")
        self.form, self.aux_logits = form, aux_logits
        stem = form.stem(in_channels, form.unit)
        for name, layer in stem.items():
            setattr(self, name, layer)
        channels, pools = form.stem_width, sum(name.startswith("maxpool") for name in stem)
        for row in form.table:
            if isinstance(row, str):
                pools += 1
                setattr(self, f"maxpool{pools}", form.pool())
                continue
            setattr(self, f"inception{row.name}", row.build(channels, form.unit))
            channels = row.out
            if aux_logits and row.name in HEADS_AFTER:
                setattr(self, HEADS_AFTER[row.name], form.head(channels, num_classes, unit=form.unit))
        self.avgpool = form.average()
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(form.dropout if dropout is None else dropout)
        self.fc1 = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutput:
        """The children run in the order of definition; a head looks at what has been computed so far."""
        self.form.size.check(self.form.name, x)
        heads = []
        for _, layer in self.children():
            if not isinstance(layer, InceptionAux):
                x = layer(x)
            elif self.training:
                heads.append(layer(x))
        return GoogLeNetOutput._make((*heads, x)) if heads else x


if __name__ == "__main__":
    from minigrad import no_grad
    from minigrad.random import Key, normal

    pictures = Tensor(normal(Key(0), (3, 3, 224, 224)).astype("float32"))
    with no_grad():
        for name, logits in GoogLeNet(aux_logits=True, num_classes=1000)(pictures)._asdict().items():
            print(f"{name}: {logits.shape}")
