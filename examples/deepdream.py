#!/usr/bin/env python3
"""What does a layer like to see? Smooth noise, changed until a channel sees much of it (DeepDream).

Mordvintsev, Olah, Tyka: Inceptionism, 2015. The picture moves along the gradient of one channel's sum, in three sizes
one after the other (octaves). What keeps it from becoming mere noise: at each step it is shifted by chance, so that no
pixel keeps its place; the gradient is smoothed and brought to one length; and the picture is smoothed a little.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from subject import Subject, parser, subject, told

from inception.report import drawing
from minigrad import Tensor
from minigrad.backend import to_host
from minigrad.errors import MinigradError, no_such
from minigrad.random import Key, uniform


def result(model: Any, x: Tensor, layer: str) -> Tensor:
    """What comes out of a row of the network's table; what lies behind it does not run. "classes" are the logits."""
    for step in model.form.steps:
        x = getattr(model, step.name)(x)
        if step.name == layer:
            return x
    return model.fc1(model.flatten(model.avgpool(x)))


def strengths(model: Any, x: np.ndarray, layer: str) -> np.ndarray:
    """The mean of each channel of each picture, (N, C)."""
    y = to_host(result(model, Tensor(x), layer).data)
    return y.reshape(*y.shape[:2], -1).mean(2)


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """(N, 3, S, S) to (N, 3, size, size), linearly between the middles of pixels."""
    at = np.clip((np.arange(size) + 0.5) * x.shape[-1] / size - 0.5, 0, x.shape[-1] - 1)
    share = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(x.shape[-1])))  # (size, S): of each old pixel in each new
    return (share @ x @ share.T).astype(np.float32)


def smoothed(x: np.ndarray, share: float) -> np.ndarray:
    """Mix every pixel with its neighbours."""
    for axis in (2, 3):
        x = (1 - share) * x + share / 2 * (np.roll(x, 1, axis) + np.roll(x, -1, axis))
    return x


def dream(look: Subject, layer: str, options: Any) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Channels of a layer, a picture for each (N, 3, size, size), and how strong each is at first and then (N, 2)."""
    low, high = (((edge - look.mean) / look.std)[:, None, None] for edge in (0, 1))
    noise = (uniform(Key(0).fold("start"), (1, 3, 6, 6)) - 0.5).astype(np.float32)
    first = strengths(look.model, resized(noise, options.size // 2), layer)[0]
    channels = [int(k) for k in np.flatnonzero(first)][:10]  # where ReLU has all at 0, there is no gradient
    n, x = len(channels), np.repeat(noise, len(channels), 0)
    start = resized(x, options.size)
    for octave, side in enumerate((options.size // 2, options.size * 3 // 4, options.size)):
        x = resized(x, side)
        for step in range(options.steps):
            shift = [int(s) for s in uniform(Key(0).fold("shift", octave, step), (2,)) * 16]
            moved = Tensor(np.roll(x, shift, (2, 3)), requires_grad=True)
            y = result(look.model, moved, layer)
            chosen = np.zeros(y.shape, np.float32)
            chosen[np.arange(n), channels] = 1
            (y * Tensor(chosen)).sum().backward()
            gradient = smoothed(np.roll(to_host(moved.grad), [-s for s in shift], (2, 3)), 0.5)
            gradient /= gradient.std((1, 2, 3), keepdims=True) + 1e-9
            x = np.clip(smoothed(x + 0.08 * gradient, 0.15), low, high).astype(np.float32)
    return channels, x, np.stack([strengths(look.model, a, layer)[np.arange(n), channels] for a in (start, x)], 1)


def main() -> None:
    words = parser(__doc__, "deepdream", "only to say how good the model is")
    words.add_argument("--layer", help="a row of the network's table, or `classes` (default: two rows and these)")
    words.add_argument("--size", type=int, default=64, help="pixels a side at the end (%(default)s)")
    words.add_argument("--steps", type=int, default=12, help="in each of three octaves (%(default)s)")
    words.set_defaults(weights="googlenet_small", data=None)  # it has seen more to dream of; noise is enough
    options = words.parse_args()
    look = subject(options)
    names = [*(step.name for step in look.model.form.steps), "classes"]
    blocks = [name for name in names[:-1] if "pool" not in name]
    if options.layer not in (None, *names):
        raise MinigradError(no_such("layer", options.layer, names))
    rows = [options.layer] if options.layer else [blocks[len(blocks) // 4], blocks[len(blocks) // 2], "classes"]
    path = options.out / f"{options.layer or 'deepdream'}.png"
    shape, height = ((2, 5), 5.6) if options.layer else ((1, 10), 5.1)
    with drawing(path, 11, height) as figure:
        for part, layer in zip(np.atleast_1d(figure.subfigures(len(rows), 1)), rows, strict=True):
            channels, pictures, strength = dream(look, layer, options)
            what = "class" if layer == "classes" else "channel"
            a, b = strength.mean(0)
            print(f"{layer}: {len(channels)} × {what}, mean {a:.3g} before, {b:.3g} after {3 * options.steps} steps")
            part.suptitle(f"{layer}: what each {what} makes of the same smooth noise (its mean before → after)", size=9)
            for k, axes, x, (a, b) in zip(channels, part.subplots(*shape).ravel(), pictures, strength, strict=False):
                axes.imshow(look.picture(x))
                name = look.about["classes"][k] if layer == "classes" else f"channel {k}"
                axes.set_title(f"{name}\n{a:.2g} → {b:.2g}", size=8)
            for axes in part.axes:
                axes.set_axis_off()
    print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
