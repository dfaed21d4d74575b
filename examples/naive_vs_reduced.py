#!/usr/bin/env python3
"""What do the 1×1 reductions of the Inception module save? Figure 2a against figure 2b of arXiv:1409.4842.

Both kinds of module have the widths of 3a and 3b of GoogLeNet's table, and are counted at its 28×28 pixels. Then two
small networks that differ only in this are trained on shapes, about a minute on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from subject import near_chance, told

from inception.data import Dataset, Loader, load_shapes, mean_and_std
from inception.models import ConvBlock, InceptionBlock, NaiveInceptionBlock
from inception.report import drawing, matplotlib_
from inception.training import RECIPES, Epoch, Training
from minigrad import nn, summary
from minigrad.nn import Module
from minigrad.random import seeded
from minigrad.watch import columns

COLOURS = {"naive": "#767676", "reduced": "#D55E00"}


def modules(reduced: bool, channels: int, part: int = 1) -> nn.Sequential:
    """3a and 3b, all widths divided by `part`."""
    rows = [(64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)]  # 1×1, r3×3, 3×3, r5×5, 5×5, pool
    blocks: list[Any] = []
    for row in rows:
        c1, r3, c3, r5, c5, pool = (width // part for width in row)
        widths = (c1, r3, c3, r5, c5, pool) if reduced else (c1, c3, c5)
        blocks.append((InceptionBlock if reduced else NaiveInceptionBlock)(channels, *widths))
        channels = blocks[-1].out_channels
    return nn.Sequential(*blocks)


def network(reduced: bool) -> Module:
    """The two modules at 1/8 of their widths between a stem and a classifier."""
    with seeded(0):
        inner = modules(reduced, 24, part=8)
        stem = ConvBlock(3, 24, kernel_size=3, stride=2, padding=1)
        last = summary(inner, (24, 16, 16), depth=1).rows[-1].output[0]
        return nn.Sequential(stem, inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


def train(name: str, train_set: Dataset, test_set: Dataset, epochs: int) -> tuple[Module, list[Epoch]]:
    """A network of one kind on shapes, and what was reported after each pass."""
    mean, std = mean_and_std(train_set)
    size = min(32, len(train_set))
    recipe = dataclasses.replace(RECIPES["shapes"], epochs=epochs, batch_size=size, optimizer="adamw", lr=0.02)
    model = network(name == "reduced")
    loader = Loader(train_set, size, mean=mean, std=std, shuffle=True, drop_last=True)
    training = Training(model, loader, recipe, test=Loader(test_set, 100, mean=mean, std=std))

    def tell(epoch: Epoch) -> None:
        print(f"{name}, pass {epoch.number} of {epochs}: loss {epoch.losses['loss']:.3f}, "
              f"test accuracy {epoch.test.accuracy:.1%}, {epoch.seconds:.0f} s", flush=True)  # fmt: skip

    training.run(after_epoch=tell)
    return model, training.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=5000, help="shapes to train on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (%(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="shapes to test on (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/naive_vs_reduced"), help="folder of the drawing")
    options = parser.parse_args()
    matplotlib_()  # missed now rather than when all is computed

    rows: list[tuple[str, ...]] = [("3a and 3b at 28×28", "channels out", "parameters", "multiply-adds", "kept bytes")]
    costs = {}
    for name in COLOURS:
        cost = costs[name] = summary(modules(name == "reduced", 192), (192, 28, 28), depth=1)
        counts = cost.rows[-1].output[0], cost.parameters, cost.multiply_adds, cost.saved_bytes
        rows.append((name, *(f"{count:,}" for count in counts)))
    print(columns(rows, left=1), "\n")

    sets = load_shapes(options.train, options.test)
    reports = {}
    rows = [("at 1/8 of the widths, on shapes", "multiply-adds", "accuracy", "seconds")]
    for name in COLOURS:
        model, reports[name] = train(name, *sets, options.epochs)
        accuracy, seconds = reports[name][-1].test.accuracy, sum(epoch.seconds for epoch in reports[name])
        cost, note = summary(model, (3, 32, 32)).multiply_adds, near_chance(accuracy, 10, options.test)
        rows.append((name, f"{cost:,}", f"{accuracy:.1%}{note}", f"{seconds:.1f}"))
    print(f"\n{columns(rows, left=1)}\nThe counts are exact; the accuracies are of one seed.")

    path = options.out / "naive_vs_reduced.png"
    with drawing(path, 10, 3.6) as figure:
        bars, *curves = figure.subplots(1, 3)
        for k, (name, colour) in enumerate(COLOURS.items()):
            counts = [row.multiply_adds / 1e6 for row in costs[name].rows if row.path in ("0", "1")]
            drawn = bars.bar(np.arange(2) + 0.4 * k, counts, 0.36, color=colour, label=name)
            bars.bar_label(drawn, fmt="{:,.0f}", size=8)
            epochs = reports[name]
            x = [epoch.number for epoch in epochs]
            curves[0].plot(x, [epoch.test.loss for epoch in epochs], marker="o", color=colour, label=name)
            curves[1].plot(x, [100 * epoch.test.accuracy for epoch in epochs], marker="o", color=colour)
        bars.set_xticks([0.2, 1.2], ["3a", "3b"])
        curves[1].axhline(10, color="#767676", linestyle=":", label="guessing")
        titles = "multiply-adds, millions, at 28×28", "1/8 of the widths: test loss", "test accuracy, %"
        for axes, title in zip((bars, *curves), titles, strict=True):
            axes.set_title(title, loc="left", size=10)
            axes.legend()
        for axes in curves:
            axes.set_xlabel("passes over the training pictures")
            axes.xaxis.get_major_locator().set_params(integer=True)
    print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
