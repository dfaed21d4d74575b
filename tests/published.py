"""The published networks as text: `published.md`, row by row, and our modules in the same words.

A row of the file is: its number or name | figure | output channels × height × width | parameters. A figure reads:

    3×3/2 p1 → 64      a convolution unit, 64 channels, stride 2, padding 1; without /s stride 1, without p padding 0
    1×7 p(0,3)         height 1, width 7, padding of rows and of columns
    max 3×3/2 ceil     a pool; averages say whether padding counts (incl.pad) or not (excl.pad)
    a ⟶ b              one after the other
    1: … <br>2: …      branches, whose outputs are concatenated
    [ a ‖ b ]          a fork at the end of a branch, concatenated too
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from minigrad import nn


class PublishedRow(NamedTuple):
    figure: str
    output: tuple[int, ...]
    parameters: int


def rows(network: str) -> list[PublishedRow]:
    """The table of a network; a line such as "7–10 | … each" stands for four rows."""
    text = Path(__file__).with_name("published.md").read_text("utf-8")
    section = text.partition(f"\n## {network}\n")[2].partition("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("|"):
            number, figure, output, parameters = (cell.strip() for cell in line.strip("|").split("|"))
            first, _, last = number.partition("–")
            row = PublishedRow(
                re.sub(r"(/1 p1) ceil", r"\1", figure),  # where ceil makes no difference
                tuple(map(int, output.split("×"))),
                int(parameters.removesuffix(" each").replace(",", "")),
            )
            found += [row] * (int(last) - int(first) + 1 if last else 1)
    assert found, network
    return found


def figure(module: nn.Module, *, inner: bool = False) -> str:
    """One of our modules in the words of the file."""
    children = [child for _, child in module.children()]
    match module:
        case nn.Sequential():
            return " ⟶ ".join(figure(child, inner=True) for child in children)
        case nn.Branches() if inner:
            return f"[ {' ‖ '.join(figure(child, inner=True) for child in children)} ]"
        case nn.Branches():
            return "<br>".join(f"{i}: {figure(child, inner=True)}" for i, child in enumerate(children, start=1))
        case nn.MaxPool2d():
            return f"max {window(module)}{' ceil' * module.ceil_mode}"
        case nn.AvgPool2d():
            return f"avg {window(module)} {'incl' if module.count_padding else 'excl'}.pad"
        case nn.LocalResponseNorm():
            return f"LRN(size {module.size}, α {module.alpha}, β {module.beta}, k {module.k:g})"
        case nn.Conv2d() if module.groups > 1:
            out, each = module.weight.shape[0], module.weight.shape[0] // module.groups
            bias = "no bias" if module.bias is None else "bias"
            return f"depthwise {window(module)}, multiplier {each} → {out} ({bias}, no BN, no ReLU)"
    if hasattr(module, "up"):
        out = module.up.weight.shape[0]
        bias = "with bias" if module.up.bias is not None else "no bias"
        end = f"×{module.scale:g} ⟶ + input{' ⟶ ReLU' if module.relu else ' (no ReLU)'}"
        return f"{figure(module.branches)}<br>concat ⟶ {window(module.up)} → {out} {bias}, no BN ⟶ {end}"
    return f"{window(module.conv)} → {module.conv.weight.shape[0]}"


def window(module: nn.Module) -> str:
    (kh, kw), (s, _), (ph, pw) = (
        (size, size) if isinstance(size, int) else size for size in (module.kernel_size, module.stride, module.padding)
    )
    stride = f"/{s}" if s > 1 or not isinstance(module, nn.Conv2d) else ""
    padding = f" p({ph},{pw})" if ph != pw else f" p{ph}" if ph else ""
    return f"{kh}×{kw}{stride}{padding}"
