"""The networks, by name."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import NamedTuple

from inception.models.blocks import ConvBlock, InceptionAux, InceptionBlock, NaiveInceptionBlock
from inception.models.network import Form, Inception
from minigrad import nn, summary
from minigrad.errors import MinigradError, no_such
from minigrad.random import Key, seeded


@cache
def _forms() -> dict[str, Form]:
    """The networks of this package; `register` adds to them."""
    return {form.name: form for form in _published()}


def _published() -> list[Form]:
    # Imported when needed, so that `python -m inception.models.googlenet` finds its module not yet imported.
    rooms = ("googlenet", "bn_inception", "inception_v3", "inception_v4", "inception_resnet", "small")
    return [form for room in rooms for form in import_module(f"inception.models.{room}").FORMS]


def form_of(name: str) -> Form:
    """What create_model builds by this name. Raises MinigradError that says what there is."""
    if name not in _forms():
        raise MinigradError(no_such("model", name, _forms()))
    return _forms()[name]


def register(form: Form) -> None:
    """Make a network of your own known by its name: to create_model, to load_model, to the command line called from
    your program. The same name again replaces what was registered, but no network of this package.
    """
    if any(form.name == published.name for published in _published()):
        raise MinigradError(f"there is a model {form.name!r} in this package already: name yours otherwise")
    _forms()[form.name] = form


def list_models() -> list[str]:
    """The names that create_model knows."""
    return list(_forms())


def describe_model(name: str) -> str:
    """One line on a model: what it is, and the paper."""
    return form_of(name).about


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    aux_logits: bool | None = None,
    in_channels: int = 3,
    dropout: float | None = None,
    width: float = 1.0,
    seed: int = 0,
) -> Inception:
    """A network with fresh weights, drawn as its authors or its published implementation draw them.

    name          one of list_models()
    num_classes   outputs; as published if None
    aux_logits    with auxiliary heads; as published if None
    in_channels   3 for colour pictures
    dropout       before the classifier; as published if None
    width         multiplies the widths of all layers: 0.25 makes a small network of the same depth
    seed          of the weights: the same name, options and seed give the same weights
    raises        MinigradError for an unknown name, or heads where none were published
    """
    form = form_of(name)
    with seeded(seed):
        model = Inception(
            form,
            num_classes=num_classes,
            aux_logits=aux_logits,
            in_channels=in_channels,
            dropout=dropout,
            width=width,
        )
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not nn.outlined():
            form.initialise(path, layer, Key(seed))
    return model


class Comparison(NamedTuple):
    """What a network costs, at the size and with the classes it was published for."""

    name: str
    about: str
    size: int  # pixels a side
    parameters: int  # without auxiliary heads
    head_parameters: int  # what the published heads add; 0 without
    multiply_adds: int  # for one picture, without heads
    saved_bytes: int  # kept for backward, for one picture


def compare(*names: str) -> list[Comparison]:
    """The networks side by side (all of them without names), counted by running each once on an empty picture."""
    lines = []
    for name in names or list_models():
        form = form_of(name)
        model = Inception(form)
        heads = set(form.heads.values())
        rows = summary(model, (3, form.size.native, form.size.native), depth=1).rows
        of_heads = [row for row in rows if row.path in heads]
        of_network = [row for row in rows if row.path not in heads]
        lines.append(
            Comparison(
                name,
                form.about,
                form.size.native,
                sum(row.parameters for row in of_network),
                sum(row.parameters for row in of_heads),
                sum(row.multiply_adds for row in of_network),
                sum(row.saved_bytes for row in of_network),
            )
        )
    return lines


__all__ = [
    "Comparison",
    "ConvBlock",
    "Inception",
    "InceptionAux",
    "InceptionBlock",
    "NaiveInceptionBlock",
    "compare",
    "create_model",
    "describe_model",
    "form_of",
    "list_models",
    "register",
]
