"""The networks, by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from inception.models.blocks import ConvBlock, InceptionAux, InceptionBlock, NaiveInceptionBlock
from minigrad import nn
from minigrad.errors import MinigradError
from minigrad.nn import init
from minigrad.random import Key, seeded

# name -> (its form in googlenet.py, classes it was published for, whether with auxiliary heads)
_MODELS = {
    "googlenet": ("ARTICLE", 1000, True),
    "googlenet_bn": ("BATCH_NORM", 1000, True),
    "googlenet_small": ("SMALL", 10, False),
}


def list_models() -> list[str]:
    """The names that create_model knows."""
    return list(_MODELS)


def create_model(
    name: str, *, num_classes: int | None = None, aux_logits: bool | None = None, seed: int = 0, **options: Any
) -> nn.Module:
    """A network with fresh weights.

    name          one of list_models()
    num_classes   outputs; as published if None
    aux_logits    with auxiliary heads; as published if None
    seed          of the weights: the same name, options and seed give the same weights
    options       of the model's class: in_channels, dropout
    raises        MinigradError for an unknown name
    """
    if name not in _MODELS:
        raise MinigradError(f"there is no model {name!r}; choose one of: {', '.join(_MODELS)}")
    # Imported when needed, so that `python -m inception.models.googlenet` finds its module not yet imported.
    googlenet = import_module("inception.models.googlenet")
    form_name, classes, heads = _MODELS[name]
    form = getattr(googlenet, form_name)
    with seeded(seed):
        model: nn.Module = googlenet.GoogLeNet(
            heads if aux_logits is None else aux_logits,
            classes if num_classes is None else num_classes,
            form=form,
            **options,
        )
    if form is googlenet.SMALL:
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                init.he_normal_(module.weight.data, Key(seed).fold("he", path))
    return model


__all__ = [
    "ConvBlock",
    "InceptionAux",
    "InceptionBlock",
    "NaiveInceptionBlock",
    "create_model",
    "list_models",
]
