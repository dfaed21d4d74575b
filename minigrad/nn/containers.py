"""Modules made of modules."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from minigrad import ops
from minigrad.errors import DtypeError
from minigrad.nn.layers import ConvNormReLU, together
from minigrad.nn.module import Module
from minigrad.tensor import Tensor


class Sequential(Module):
    """One module after the other. Children are named "0", "1", …"""

    def __init__(self, *modules: Module):
        _adopt(self, {str(i): module for i, module in enumerate(modules)})

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

    Branches are children with the names they are given by, or "0", "1", … Those that begin with a 1×1 unit do so
    together: one product reads the input once for all of them.
    """

    def __init__(self, *branches: Module, **named: Module):
        _adopt(self, {**{str(i): b for i, b in enumerate(branches)}, **named})

    def forward(self, x: Tensor) -> Tensor:
        # Each branch as the chain of its layers; the first layers that are 1×1 units; what these make of x at once; and
        # then every branch goes on from there, or from x.
        branches = [branch for _, branch in self.children()]
        chains = [
            [layer for _, layer in branch.children()] if type(branch) is Sequential else [branch] for branch in branches
        ]
        units = {
            i: chain[0]
            for i, chain in enumerate(chains)
            if chain and isinstance(chain[0], ConvNormReLU) and chain[0].is_pointwise
            if type(chain[0]).forward is ConvNormReLU.forward and not (chain[0].recompute or branches[i].recompute)
        }
        begun = dict(zip(units, together(x, *units.values()), strict=True)) if len(units) > 1 else {}
        return ops.concat(
            [
                reduce(lambda y, layer: layer(y), chain[1:], begun[i]) if i in begun else branch(x)
                for i, (branch, chain) in enumerate(zip(branches, chains, strict=True))
            ]
        )


def _adopt(parent: Module, children: Mapping[str, Module]) -> None:
    """Set the children. What is no module would be passed over without a word."""
    for name, child in children.items():
        if not isinstance(child, Module):
            kind = "the class itself" if isinstance(child, type) else f"a {type(child).__name__}"
            raise DtypeError(
                f"{type(parent).__name__} is made of modules, got {kind} as {name!r}: write "
                f"{type(parent).__name__}(*layers) for a list, ReLU() for a class or a function"
            )
        setattr(parent, name, child)
