#!/usr/bin/env python3
"""What do auxiliary heads send into the network? The gradient's length along the depth, with them and without.

GoogLeNet's heads look at the modules 4a and 4d while it trains, and their losses count 0.3 each (arXiv:1409.4842,
section 5). Fresh weights, one batch of shapes. In the paper's network the gradient fades on its way to the stem, and
the heads make up for it; with batch norm (--model googlenet_small, say) it does not fade, and they hardly matter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from subject import told

from inception.data import load_shapes, mean_and_std, normalise
from inception.models import create_model, form_of, list_models
from inception.report import drawing
from inception.training import to_tensor
from minigrad import ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError
from minigrad.random import Key
from minigrad.watch import Event, columns, each_op


def lengths(model: Any, images: np.ndarray, labels: np.ndarray, weight: float) -> dict[str, float]:
    """Of dL/dy for the result y of every row of the network's table; the heads' losses count `weight` each."""
    names = [step.name for step in model.form.steps]
    found: dict[str, float] = {}

    def see(event: Event) -> None:
        row = event.path.split(".")[0]
        # Backward comes to a row's last op first: it has the gradient of the row's result.
        if event.direction == "backward" and row in names and row not in found and event.inputs:
            found[row] = float(np.linalg.norm(to_host(event.inputs[0][1])))

    model.train().set_key(Key(0))
    with each_op(model, see):
        *heads, logits = model(to_tensor(images))
        loss = ops.cross_entropy(logits, labels)
        for head in heads:
            loss = loss + ops.cross_entropy(head, labels) * weight
        loss.backward()
    return {name: found[name] for name in names if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="googlenet_paper", help="one that has heads (%(default)s)")
    parser.add_argument("--width", type=float, default=0.25, help="of its layers, a factor (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="pictures (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/aux_heads"), help="folder of the drawing (%(default)s)")
    options = parser.parse_args()
    if options.model in list_models() and not form_of(options.model).heads:
        having = ", ".join(name for name in list_models() if form_of(name).heads)
        raise MinigradError(f"{options.model} has no auxiliary heads: take {having}")
    model: Any = create_model(options.model, num_classes=10, aux_logits=True, width=options.width)
    shapes, _ = load_shapes(options.batch, 0)
    size = model.form.size.native
    grid = np.arange(size) * 32 // size  # pixels repeated where the network takes larger pictures
    images = normalise(shapes.images[:, grid][:, :, grid], *mean_and_std(shapes))
    without, with_heads = (lengths(model, images, shapes.labels, weight) for weight in (0.0, 0.3))
    rows = [("row", "without", "with", "times")]
    rows += [
        (n, f"{a:.3g}", f"{b:.3g}", f"{b / a:.2f}")
        for (n, a), b in zip(without.items(), with_heads.values(), strict=True)
    ]
    print(columns(rows, left=1))
    path = options.out / f"{options.model}.png"
    with drawing(path, 9, 4.5) as figure:
        axes = figure.subplots()
        with_ = f"with auxiliary heads ({len(model.form.heads)}), 0.3 each"
        axes.semilogy(list(without.values()), marker="o", color="#767676", label="classifier alone")
        axes.semilogy(list(with_heads.values()), marker="o", color="#D55E00", label=with_)
        for head in model.form.heads:
            axes.axvline(list(without).index(head), color="#D55E00", linestyle=":", linewidth=1)
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(range(len(without)), list(without), rotation=40, ha="right")
        axes.set_title(
            f"{options.model}, fresh weights: length of dL/dy of each row (dotted: a head looks here)",
            loc="left",
            size=10,
        )
        axes.legend()
    print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
