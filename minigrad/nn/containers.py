"""Modules made of modules."""

from __future__ import annotations

from typing import Any

from minigrad import ops
from minigrad.nn.module import Module
from minigrad.tensor import Tensor


class Sequential(Module):
    """One module after the other. Children are named "0", "1", …"""

    def __init__(self, *modules: Module):
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __getitem__(self, index: int) -> Module:
        return [child for _, child in self.children()][index]

    def __len__(self) -> int:
        return sum(1 for _ in self.children())

    def forward(self, x: Any) -> Any:
        for _, child in self.children():
            x = child(x)
        return x


class Branches(Module):
    """Every branch sees the same input; their outputs are joined along the channels, in order.

    Branches are children with the names they are given by, or "0", "1", …
    """

    def __init__(self, *branches: Module, **named: Module):
        for name, branch in {**{str(i): b for i, b in enumerate(branches)}, **named}.items():
            setattr(self, name, branch)

    def forward(self, x: Tensor) -> Tensor:
        return ops.concat([branch(x) for _, branch in self.children()])
