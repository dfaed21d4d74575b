#!/usr/bin/env python3
"""What do the 1×1 reductions of the Inception module save? Figure 2a against figure 2b of arXiv:1409.4842.

Both kinds of module have the widths of 3a and 3b of GoogLeNet's table, and are counted at its 28×28 pixels. Then two
small networks that differ only in this are trained on shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

from subject import told

from inception.data import Loader, load_shapes, mean_and_std
from inception.models import ConvBlock, InceptionBlock, NaiveInceptionBlock
from inception.training import RECIPES, Training, evaluate
from minigrad import nn, summary
from minigrad.nn import Module
from minigrad.random import seeded
from minigrad.watch import columns


def modules(reduced: bool, channels: int, part: int = 1) -> nn.Sequential:
    """3a and 3b, all widths divided by `part`."""
    rows = [(64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)]  # 1×1, r3×3, 3×3, r5×5, 5×5, pool
    blocks: list[Module] = []
    for row in rows:
        c1, r3, c3, r5, c5, pool = (width // part for width in row)
        block = (
            InceptionBlock(channels, c1, r3, c3, r5, c5, pool) if reduced else NaiveInceptionBlock(channels, c1, c3, c5)
        )
        blocks.append(block)
        channels = block.out_channels
    return nn.Sequential(*blocks)


def network(reduced: bool) -> Module:
    """The two modules at 1/8 of their widths between a stem and a classifier."""
    with seeded(0):
        inner = modules(reduced, 24, part=8)
        stem = ConvBlock(3, 24, kernel_size=3, stride=2, padding=1)
        last = summary(inner, (24, 16, 16), depth=1).rows[-1].output[0]
        return nn.Sequential(stem, inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=10000, help="shapes to train on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (%(default)s)")
    parser.add_argument("--test", type=int, default=500, help="shapes to test on (%(default)s)")
    options = parser.parse_args()

    rows: list[tuple[str, ...]] = [("3a and 3b at 28×28", "channels out", "parameters", "multiply-adds", "kept bytes")]
    for name, reduced in (("naive", False), ("reduced", True)):
        cost = summary(modules(reduced, 192), (192, 28, 28), depth=1)
        counts = cost.rows[-1].output[0], cost.parameters, cost.multiply_adds, cost.saved_bytes
        rows.append((name, *(f"{count:,}" for count in counts)))
    print(columns(rows, left=1), "\n")

    train, test = load_shapes(options.train, options.test)
    mean, std = mean_and_std(train)
    recipe = dataclasses.replace(
        RECIPES["shapes"], epochs=options.epochs, batch_size=min(32, options.train), optimizer="adamw", lr=0.01
    )
    rows = [("at 1/8 of the widths, on shapes", "multiply-adds", "accuracy", "seconds")]
    for name, reduced in (("naive", False), ("reduced", True)):
        model, started = network(reduced), time.perf_counter()
        loader = Loader(train, recipe.batch_size, mean=mean, std=std, shuffle=True, drop_last=True)
        Training(model, loader, recipe, quiet=True).run()
        seconds = time.perf_counter() - started
        accuracy = evaluate(model, Loader(test, 100, mean=mean, std=std), quiet=True).accuracy
        cost = summary(model, (3, 32, 32)).multiply_adds
        rows.append((name, f"{cost:,}", f"{accuracy:.1%}", f"{seconds:.1f}"))
    print(columns(rows, left=1))
    print("The counts are exact; the accuracies are of one seed.")


if __name__ == "__main__":
    sys.exit(told(main))
