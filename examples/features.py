#!/usr/bin/env python3
"""What has the network learnt to see? The filters of its first layer, and the pictures that excite single units most.

A unit is a channel of a row of the network's table (--layer, its last by default); how much a picture excites it is
the largest value of that channel over the picture's pixels, after the ReLU. The frame is where that was.
"""

from __future__ import annotations

import sys

import numpy as np
from subject import parser, subject, told

from inception.training.report import drawing
from minigrad import nn, no_grad
from minigrad.backend import to_host
from minigrad.errors import MinigradError, no_such
from minigrad.watch import each_op


def main() -> None:
    words = parser(__doc__, "features")
    words.add_argument("--layer", help="a row of the network's table")
    words.add_argument("--units", type=int, default=6, help="at most, each for another class (%(default)s)")
    words.add_argument("--pictures", type=int, default=500, help="to search (%(default)s)")
    options = words.parse_args()
    look = subject(options)
    names = [step.name for step in look.model.form.steps]
    layer = options.layer or names[-1]
    if layer not in names:
        raise MinigradError(no_such("layer", layer, names))

    first = next(m for _, m in look.model.named_modules() if isinstance(m, nn.Conv2d))
    filters = to_host(first.weight.data)  # (O, 3, KH, KW)
    reach = np.abs(filters).max((1, 2, 3), keepdims=True)
    tiles = (filters / reach / 2 + 0.5).transpose(0, 2, 3, 1)  # each filter uses the whole range
    path = options.out / "filters.png"
    side = int(np.ceil(len(tiles) ** 0.5))
    with drawing(path, 6, 6) as figure:
        for axes, tile in zip(figure.subplots(side, side, squeeze=False).ravel(), tiles, strict=False):
            axes.imshow(tile if tile.shape[2] == 3 else tile.mean(2), cmap="gray")
        for axes in figure.axes:
            axes.set_axis_off()
    print(f"{len(tiles)} filters {filters.shape[2]}×{filters.shape[3]} of the first layer; drawn: {path}")

    best, places = [], []
    n = min(options.pictures, len(look.dataset))
    for start in range(0, n, 50):
        maps: dict[str, np.ndarray] = {}
        with no_grad(), each_op(look.model, lambda e, maps=maps: maps.update({e.path: to_host(e.outputs[0][1])})):
            look.model(look.batch(np.arange(start, min(start + 50, n))))
        a = maps[layer]
        flat = a.reshape(*a.shape[:2], -1)
        best.append(flat.max(2))
        places.append(flat.argmax(2))
        grid = a.shape[2:]
    value, place = np.concatenate(best), np.concatenate(places)  # (pictures, units)
    tops = np.argsort(-value, axis=0)[:8]  # (8, units): the pictures that excite each most
    chosen: dict[int, int] = {}  # a unit for each class that is the commonest among some unit's eight
    for unit in np.argsort(-value.std(0) / (value.mean(0) + 1e-6)):
        chosen.setdefault(int(np.bincount(look.dataset.labels[tops[:, unit]]).argmax()), unit)
    units = list(chosen.values())[: options.units]
    path, h = options.out / f"{layer}.png", look.dataset.images.shape[1]
    with drawing(path, 9, 1.15 * len(units)) as figure:
        for unit, row in zip(units, figure.subplots(len(units), 9, squeeze=False), strict=True):
            top = tops[:, unit]
            labels = look.dataset.labels[top]
            common = np.bincount(labels).argmax()
            for axes in row:
                axes.set_axis_off()
            text = f"unit {unit}\n{(labels == common).sum()} of 8:\n{look.dataset.classes[common]}"
            row[0].text(0, 0.5, text, size=8, va="center", transform=row[0].transAxes)
            for axes, picture in zip(row[1:], top, strict=False):
                axes.imshow(look.dataset.images[picture])
                y, x = np.unravel_index(place[picture, unit], grid)
                cell = h / grid[0]
                corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * cell + (x * cell - 0.5, y * cell - 0.5)
                axes.plot(*corner.T, color="#ffe100", linewidth=1.5)
    print(f"the 8 of {n} pictures that excite {len(units)} units of {layer} most; drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
