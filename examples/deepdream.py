#!/usr/bin/env python3
"""Change a picture until a layer sees more of what it sees in it: gradient ascent on the pixels (DeepDream).

Mordvintsev, Olah, Tyka: Inceptionism, 2015. The picture is moved along the gradient of the mean square of a layer's
result, first small and then larger (octaves), with a random shift at each step so that no pixel keeps its place.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from subject import parser, subject, told

from inception.training.report import drawing
from minigrad import Tensor
from minigrad.backend import to_host
from minigrad.errors import MinigradError, no_such
from minigrad.random import Key, uniform


def excitement(model: Any, x: Tensor, layer: str) -> Tensor:
    """The mean square of what comes out of `layer`; what lies behind it does not run."""
    for step in model.form.steps:
        x = getattr(model, step.name)(x)
        if step.name == layer:
            return (x * x).mean()
    raise MinigradError(no_such("layer", layer, [step.name for step in model.form.steps]))


def resized(x: np.ndarray, size: int) -> np.ndarray:
    """(1, 3, H, W) to (1, 3, size, size), linearly between the middles of pixels."""
    for axis in (2, 3):
        at = np.clip((np.arange(size) + 0.5) * x.shape[axis] / size - 0.5, 0, x.shape[axis] - 1)
        low = np.minimum(at.astype(int), x.shape[axis] - 2)
        share = (at - low).reshape((-1, 1) if axis == 2 else (1, -1)).astype(x.dtype)
        x = np.take(x, low, axis) * (1 - share) + np.take(x, low + 1, axis) * share
    return x


def main() -> None:
    words = parser(__doc__, "deepdream")
    words.add_argument("--layer", help="a row of the network's table (default: the one in the middle)")
    words.add_argument("--picture", type=int, default=0, help="its number in the data (%(default)s)")
    words.add_argument("--size", type=int, default=96, help="pixels a side at the end (%(default)s)")
    words.add_argument("--steps", type=int, default=15, help="in each of three octaves (%(default)s)")
    words.add_argument("--rate", type=float, default=0.06, help="of a step, in standard deviations (%(default)s)")
    options = words.parse_args()
    look = subject(options)
    layer = options.layer or look.model.form.steps[len(look.model.form.steps) // 2].name
    start = to_host(look.batch(np.array([options.picture])).data)
    dream, shown, values = start, [], []
    for octave, size in enumerate((options.size // 2, options.size * 3 // 4, options.size)):
        dream = resized(dream, size)
        for step in range(options.steps):
            shift = [int(s) for s in uniform(Key(0).fold("shift", octave, step), (2,)) * 8]
            x = Tensor(np.roll(dream, shift, (2, 3)), requires_grad=True)
            value = excitement(look.model, x, layer)
            value.backward()
            gradient = np.roll(to_host(x.grad), [-s for s in shift], (2, 3))
            dream = dream + options.rate * gradient / (np.abs(gradient).mean() + 1e-12)
            dream = np.clip(
                dream, ((0 - look.mean) / look.std)[:, None, None], ((1 - look.mean) / look.std)[:, None, None]
            )
            dream = dream.astype(np.float32)
            values.append(value.item())
        shown.append((f"{size}×{size}: {values[-1]:.3g}", dream))
    path = options.out / f"{layer}.png"
    with drawing(path, 10, 3) as figure:
        for axes, (name, x) in zip(figure.subplots(1, 4), [(f"before: {values[0]:.3g}", start), *shown], strict=True):
            axes.imshow(look.picture(x[0]))
            axes.set_title(name, size=9)
            axes.set_axis_off()
    print(f"{layer}: mean square {values[0]:.3g} before, {values[-1]:.3g} after {len(values)} steps; drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
