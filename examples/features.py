#!/usr/bin/env python3
"""What has the network learnt to see? The filters of its first layer, and the pictures that excite a channel most.

filters.png: the filters that differ most from fresh ones, those and the trained, and what they make of a picture.
LAYER.png: of some channels of a row of the network's table (--layer, its last by default) the pictures that excite
them most: by the largest value of the channel over the picture's pixels, after the ReLU. The frame is where that was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from subject import Subject, parser, subject, told

from inception.models import create_model
from inception.report import drawing
from minigrad import Tensor, nn, no_grad, ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError, no_such
from minigrad.watch import each_op

FRAME = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])


def first(model: nn.Module) -> nn.Conv2d:
    return next(layer for _, layer in model.named_modules() if isinstance(layer, nn.Conv2d))


def draw_filters(look: Subject, path: Path) -> None:
    conv, x = first(look.model), look.batch(np.arange(1))
    fresh = to_host(first(create_model(look.about["model"], **look.about["options"])).weight.data)
    trained = to_host(conv.weight.data)  # (O, 3, KH, KW)
    shown = np.argsort(-np.abs(trained - fresh).sum((1, 2, 3)))[:10]
    even = [float(np.median(np.abs(w.sum((1, 2, 3))) / np.abs(w).sum((1, 2, 3)))) for w in (fresh, trained)]
    with drawing(path, 9.5, 4.6) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1, 10))
        left.subplots().imshow(look.dataset.images[0])
        left.axes[0].set_title("a picture", size=9)
        kinds = zip(("fresh (seed 0)", "trained"), (fresh, trained), even, strict=True)
        for part, (name, filters, share) in zip(right.subfigures(2, 1), kinds, strict=True):
            part.suptitle(f"{name}: filters (grey is 0), and what each makes of the picture; "
                          f"of an even surface {share:.0%} passes", size=10)  # fmt: skip
            above, below = part.subplots(2, len(shown))
            tiles = filters / np.abs(filters).max((1, 2, 3), keepdims=True) / 2 + 0.5  # each uses the whole range
            with no_grad():
                seen = to_host(ops.conv2d(x, Tensor(filters), stride=conv.stride, padding=conv.padding).data[0])
            for k, one, two in zip(shown, above, below, strict=True):
                one.imshow(tiles[k].transpose(1, 2, 0))
                two.imshow(seen[k], cmap="gray")
                one.set_title(f"{k}", size=8)
        for axes in figure.axes:
            axes.set_axis_off()
    print(f"first layer, {len(trained)} filters {trained.shape[2]}×{trained.shape[3]}: of an even surface a fresh one "
          f"passes {even[0]:.0%} (median of |Σw|/Σ|w|), a trained one {even[1]:.0%}; drawn: {path}")  # fmt: skip


def main() -> None:
    words = parser(__doc__, "features")
    words.add_argument("--layer", help="a row of the network's table")
    words.add_argument("--channels", type=int, default=6, help="at most, each for another class (%(default)s)")
    words.add_argument("--pictures", type=int, default=500, help="to search (%(default)s)")
    options = words.parse_args()
    for name, value in (("--channels", options.channels), ("--pictures", options.pictures)):
        if value < 1:
            raise MinigradError(f"{name} must be at least 1, got {value}")
    look = subject(options)
    data, names = look.dataset, [step.name for step in look.model.form.steps]
    layer = options.layer or names[-1]
    if layer not in names:
        raise MinigradError(no_such("layer", layer, names))
    draw_filters(look, options.out / "filters.png")

    best, places, n = [], [], min(options.pictures, len(data))
    for start in range(0, n, 50):
        maps: dict[str, np.ndarray] = {}
        with no_grad(), each_op(look.model, lambda e, maps=maps: maps.update({e.path: to_host(e.outputs[0][1])})):
            look.model(look.batch(np.arange(start, min(start + 50, n))))
        flat = maps[layer].reshape(*maps[layer].shape[:2], -1)
        best.append(flat.max(2)), places.append(flat.argmax(2))
    grid = maps[layer].shape[2:]
    value, place = np.concatenate(best), np.concatenate(places)  # (pictures, channels)
    tops = np.argsort(-value, axis=0)[:8]  # (8, or all there are, channels): the pictures that excite each most
    chosen: dict[int, int] = {}  # a channel for each class that is the commonest among some channel's eight
    for k in np.argsort(-value.std(0) / (value.mean(0) + 1e-6)):
        chosen.setdefault(int(np.bincount(data.labels[tops[:, k]]).argmax()), k)
    channels, path = list(chosen.items())[: options.channels], options.out / f"{layer}.png"
    cell = np.array(data.images.shape[2:0:-1]) / grid[::-1]  # pixels of the picture, (x, y)
    with drawing(path, 9, 0.5 + 1.05 * len(channels)) as figure:
        figure.suptitle(f"{layer}: the {len(tops)} of {n} pictures that excite a channel most (yellow: where)", size=10)
        for (common, k), row in zip(channels, figure.subplots(len(channels), 9, squeeze=False), strict=True):
            for axes in row:
                axes.set_axis_off()
            own = (data.labels[tops[:, k]] == common).sum()
            text = f"channel {k}\n{own} of the {len(tops)} are\n{data.classes[common]}"
            row[0].text(1, 0.5, text, size=8, va="center", ha="right", transform=row[0].transAxes)
            for axes, picture in zip(row[1:], tops[:, k], strict=False):
                axes.imshow(data.images[picture])
                y, x = np.unravel_index(place[picture, k], grid)
                axes.plot(*((FRAME + (x, y)) * cell - 0.5).T, color="#ffe100", linewidth=1.5)
    print(f"{layer}: the {len(tops)} of {n} pictures that excite each of {len(channels)} channels most; drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
