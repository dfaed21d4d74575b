"""A network of the family: a form, which is a table and a few constants, and the module that is built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from inception.models.blocks import ConvBlock, Layer, Style, Unit
from minigrad import Tensor, nn
from minigrad.errors import MinigradError, ShapeError
from minigrad.nn import init
from minigrad.random import Key
from minigrad.tensor import check_alike


class Step(NamedTuple):
    """One row of a network's table."""

    name: str
    layer: Layer
    out: int  # channels: checked when the network is built


class InputSize(NamedTuple):
    """The pictures a network takes. All numbers are pixels a side."""

    native: int  # what it was published for
    least: int | None = None  # None: the native size only
    multiple: int = 1  # of which both sides must be multiples
    least_with_heads: int = 1  # in training with auxiliary heads

    def check(self, model: str, x: Tensor, channels: int, heads: bool = False) -> None:
        """Raise DtypeError or ShapeError in one sentence if x is no batch of such pictures."""
        check_alike(model, x)
        if x.ndim != 4 or x.shape[1] != channels:
            last = x.ndim == 4 and x.shape[3] == channels
            alone = x.ndim == 3 and x.shape[0] == channels
            remedy = ": move the channels with x.transpose(0, 3, 1, 2)" if last else ""
            remedy = f": x.reshape{(1, *x.shape)} makes a batch of one picture" if alone else remedy
            raise ShapeError(f"{model} takes pictures of shape (N, {channels}, H, W), got {x.shape}{remedy}")
        h, w = x.shape[2:]
        if self.least is None:
            if (h, w) != (self.native, self.native):
                raise ShapeError(f"{model} takes {self.native}×{self.native} pictures only, got {h}×{w}: resize them")
            return
        if min(h, w) < self.least:
            raise ShapeError(f"{model} takes pictures from {self.least}×{self.least} up, got {h}×{w}: enlarge them")
        if h % self.multiple or w % self.multiple:
            raise ShapeError(f"{model} takes pictures of sides {self.multiple}·n, got {h}×{w}: resize or crop them")
        if heads and min(h, w) < self.least_with_heads:
            raise ShapeError(
                f"{model} with auxiliary heads trains on pictures from {self.least_with_heads}×{self.least_with_heads} "
                f"up, got {h}×{w}: enlarge them, or leave the heads out with aux_logits=False"
            )


class InceptionOutput(NamedTuple):
    """What a network with one auxiliary head returns while it trains: logits (N, num_classes)."""

    aux: Tensor
    logits: Tensor


# (path of the layer, a Conv2d or Linear, the key of the model) -> nothing: it fills the layer's arrays
Initialise = Callable[[str, Any, Key], None]


def as_built(path: str, layer: Any, key: Key) -> None:
    """PyTorch's default, which layers start with."""


def he(path: str, layer: Any, key: Key) -> None:
    """Weights normal with variance 2/fan-in, truncated at two standard deviations, biases zero: as TF-slim's scope
    for Inception has it for convolutions.

    Truncation leaves 1/1.3 of the variance, which is made up for.
    """
    weight = layer.weight.data
    init.truncated_normal_(weight, key.fold("he", path), (1.3 * 2 / init.fan_in(weight)) ** 0.5)
    if layer.bias is not None:
        layer.bias.data[...] = 0


def glorot(path: str, layer: Any, key: Key) -> None:
    """Weights uniform by fan-in and fan-out, biases zero: what TF-slim's layers start with unless told otherwise."""
    init.glorot_uniform_(layer.weight.data, key.fold("glorot", path))
    if layer.bias is not None:
        layer.bias.data[...] = 0


class Form(NamedTuple):
    """A published network: its table, and what distinguishes it beside the table."""

    name: str
    about: str  # one line, with the paper
    size: InputSize
    steps: list[Step]
    unit: Unit = ConvBlock
    heads: Mapping[str, str] = {}  # the step it looks at -> name of the auxiliary head
    head: Callable[[int, int, Style], nn.Module] | None = None  # (channels, classes, style) -> a head
    aux_logits: bool = False  # published with heads
    output: type[Any] = InceptionOutput  # what training with heads returns: the heads in order, then the logits
    average: Callable[[], nn.Module] = partial(nn.AdaptiveAvgPool2d, 1)  # over the last grid
    dropout: float = 0.0
    embedding: Callable[[int], tuple[nn.Module, int]] | None = None  # between dropout and classifier: facenet's
    classes: int = 1000
    initialise: Initialise = as_built

    def __repr__(self) -> str:
        return f"<form {self.name}>"  # not the whole table, in signatures and messages


class Inception(nn.Module):
    """A network of the family: the rows of its form one after the other, mean over all pixels, classifier.

    Its weights start as layers' do; `create_model` then draws them as the form says.

    form          the published network
    num_classes   outputs of the classifier and of the heads; as published if None
    aux_logits    with auxiliary heads, which run in training only; as published if None
    in_channels   3 for colour pictures
    dropout       before the classifier; as published if None
    width         multiplies the widths of all layers: see blocks.Style

    Returns logits (N, num_classes); in training with heads a named tuple: the heads' logits in order, then "logits".
    Raises DtypeError for what is no Tensor, ShapeError for pictures of a size that the network does not take.
    """

    def __init__(
        self,
        form: Form,
        *,
        num_classes: int | None = None,
        aux_logits: bool | None = None,
        in_channels: int = 3,
        dropout: float | None = None,
        width: float = 1.0,
    ):
        classes = form.classes if num_classes is None else num_classes
        if not isinstance(classes, int) or classes < 1:
            raise ShapeError(f"{form.name}: num_classes must be an int of at least 1, got {classes!r}")
        if aux_logits and form.head is None:
            raise MinigradError(f"{form.name} has no auxiliary heads: leave out aux_logits=True (--aux)")
        self.form, self.in_channels = form, in_channels
        self.aux_logits = form.aux_logits if aux_logits is None else aux_logits
        style, channels = Style(form.unit, width), in_channels
        for step in form.steps:
            module, channels = step.layer(channels, style)
            if channels != style.channels(step.out):
                wanted = style.channels(step.out)
                raise ShapeError(f"{form.name}, row {step.name}: its branches sum to {channels} channels, not {wanted}")
            setattr(self, step.name, module)
            if self.aux_logits and form.head is not None and step.name in form.heads:
                setattr(self, form.heads[step.name], form.head(channels, classes, style))
        self.avgpool = form.average()
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(form.dropout if dropout is None else dropout)
        if form.embedding is not None:
            self.embedding, channels = form.embedding(channels)
        self.fc1 = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Any:
        """The children run in the order of definition; a head looks at what has been computed so far."""
        self.form.size.check(self.form.name, x, self.in_channels, heads=self.aux_logits and self.training)
        heads = []
        for name, layer in self.children():
            if name not in self.form.heads.values():
                x = layer(x)
            elif self.training:
                heads.append(layer(x))
        return self.form.output(*heads, x) if heads else x
