#!/usr/bin/env python3
"""Write an op of your own: its forward, its backward, the proof by gradcheck, a layer that trains with it.

Swish is x · σ(x), with σ(x) = 1 / (1 + e^−x) (Ramachandran, Zoph, Le: arXiv:1710.05941). Then the same op with a wrong
backward, as anybody might write it, and what gradcheck says to that.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from subject import told

from inception.data import load_shapes, mean_and_std, normalise
from inception.training import to_tensor
from minigrad import Tensor, gradcheck, nn, ops, optim, record
from minigrad.backend import array_module
from minigrad.errors import GradientMismatch
from minigrad.layout import Array, elementwise
from minigrad.random import seeded


def swish(x: Tensor) -> Tensor:
    """x · σ(x), element by element.

    Its gradient is σ + x·σ·(1 − σ) = σ · (1 + x − y). Saves x, σ and y.
    """
    a = x.data  # an array, of NumPy or CuPy: ops compute on arrays
    sigmoid = 1 / (1 + array_module(a).exp(-a))
    y = elementwise(array_module(a).multiply, a, sigmoid)  # channels-last on CuPy too, where a * sigmoid is not

    def backward(dy: Array) -> Array:  # what it names (a, sigmoid, y) is kept in memory until it runs
        return dy * sigmoid * (1 + a - y)

    return record("swish", y, (x,), backward)


def swish_wrong(x: Tensor) -> Tensor:
    """The same with the product rule half done: the second term, x · σ', is missing."""
    sigmoid = 1 / (1 + array_module(x.data).exp(-x.data))
    return record("swish_wrong", x.data * sigmoid, (x,), lambda dy: dy * sigmoid)


class Swish(nn.Module):
    """The op as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return swish(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps (%(default)s)")
    steps = parser.parse_args().steps

    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 4, 4)), requires_grad=True)  # float64
    print(f"swish: largest relative difference from finite differences {gradcheck(swish, x):.1e}")
    try:
        gradcheck(swish_wrong, x)
    except GradientMismatch as error:
        print(f"swish_wrong: {error}")

    shapes, _ = load_shapes(320, 0)
    striped = shapes.labels % 2  # stripes or dots: a texture, which three convolutions can see
    pictures = to_tensor(normalise(shapes.images, *mean_and_std(shapes)))
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2), nn.BatchNorm2d(16), Swish(),
            nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), Swish(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
        )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 0.01)
    for step in range(steps):
        rows = slice(step % 5 * 64, step % 5 * 64 + 64)
        loss = ops.cross_entropy(model(pictures[rows]), striped[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.3f} (guessing has {np.log(2):.3f})")


if __name__ == "__main__":
    sys.exit(told(main))
