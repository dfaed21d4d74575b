"""Modules: layers that hold parameters, and containers of them. `module.py` explains how they find each other."""

from minigrad.nn import init
from minigrad.nn.containers import Branches, Sequential
from minigrad.nn.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvNormReLU,
    Dropout,
    Flatten,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    together,
)
from minigrad.nn.module import Module, Parameter, outline, outlined

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Branches",
    "Conv2d",
    "ConvNormReLU",
    "Dropout",
    "Flatten",
    "Linear",
    "LocalResponseNorm",
    "MaxPool2d",
    "Module",
    "Parameter",
    "ReLU",
    "Sequential",
    "init",
    "outline",
    "outlined",
    "together",
]
