#!/usr/bin/env python3
"""Where does the network look? Grad-CAM (Selvaraju et al., arXiv:1610.02391) of its last grid, as a PNG.

    evidence[i, j] = max(0, Σ_c w[c] · A[c, i, j]),   w[c] = the mean over the pixels of d logit / d A[c]

A is what goes into the average pool. Its gradient is that of an activation: `retain_grad` asks for it. Above, each
picture has the map of the class that the network says. Most pictures show their object in the middle, where any blob
would look right; so below, four pictures are put together, and each of their four classes gets its map.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from subject import parser, subject, told

from inception.report import drawing
from minigrad import Tensor, nn, no_grad
from minigrad.backend import to_host
from minigrad.errors import MinigradError


class Kept(nn.Module):
    """A layer that keeps what it was given, and asks for its gradient."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.retain_grad()
        return self.layer(x)


def evidence(model: Any, x: Tensor, classes: np.ndarray) -> np.ndarray:
    """(N, H, W), not negative: where in each of N pictures that class's logit comes from."""
    logits = model(x)
    chosen = np.zeros(logits.shape, np.float32)
    chosen[np.arange(len(classes)), classes] = 1
    (logits * Tensor(chosen)).sum().backward()  # no picture's logit depends on another's pixels: one pass does for all
    a, gradient = to_host(model.avgpool.seen.data), to_host(model.avgpool.seen.grad)
    return np.maximum((gradient.mean((2, 3), keepdims=True) * a).sum(1), 0)


def main() -> None:
    words = parser(__doc__, "gradcam")
    words.add_argument("--mosaics", type=int, default=20, help="of four pictures, to measure on (%(default)s)")
    options = words.parse_args()
    look = subject(options)
    images, labels, classes, model = look.dataset.images, look.dataset.labels, look.dataset.classes, look.model
    rows = np.random.default_rng(0).permutation(len(labels))[: 10 * options.mosaics + 20]
    with no_grad():
        parts = (rows[start : start + 50] for start in range(0, len(rows), 50))
        said = np.concatenate([to_host(model(look.batch(part)).data).argmax(1) for part in parts])
    right = rows[said == labels[rows]]  # the map of a class that it takes for another would show nothing
    groups = [right[start : start + 4] for start in range(0, len(right) - 3, 4)]
    groups = [four for four in groups if len(set(labels[four])) == 4][: max(1, options.mosaics)]
    if not groups:
        raise MinigradError(f"--data {options.data}: too few pictures of four different classes are recognised")
    model.avgpool = Kept(model.avgpool)
    rows, said = rows[:5], said[:5]
    single = evidence(model, look.batch(rows, requires_grad=True), said)
    fours = [np.vstack([np.hstack(images[four[:2]]), np.hstack(images[four[2:]])]) for four in groups]
    xs = (look.tensor(np.stack([picture] * 4), requires_grad=True) for picture in fours)
    maps = [evidence(model, x, labels[four]) for x, four in zip(xs, groups, strict=True)]
    h, w = (size // 2 for size in maps[0].shape[1:])
    own = [m[k, k // 2 * h :][:h, k % 2 * w :][:, :w].sum() / m[k].sum() for m in maps for k in range(4) if m[k].any()]

    path = options.out / "gradcam.png"
    with drawing(path, 9, 7.6) as figure:
        figure.suptitle(f"{options.weights}: where the evidence for a class lies", size=11)
        grid = figure.subplots(4, 5)
        for axes in grid.ravel():
            axes.set_axis_off()

        def show(axes: Any, picture: Any, title: str, heat: Any = None, colour: str = "black") -> Any:
            axes.set_title(title, size=8, color=colour)
            if heat is None:
                return axes.imshow(picture)
            axes.imshow(picture.mean(2), cmap="gray")
            extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
            return axes.imshow(heat / (heat.max() or 1), cmap="inferno", alpha=0.65, extent=extent, vmin=0, vmax=1)

        for above, below, i, k, heat in zip(grid[0], grid[1], rows, said, single, strict=False):
            show(above, images[i], f"is: {classes[labels[i]]}")
            colour = "black" if k == labels[i] else "#D55E00"
            show(below, images[i], f"map for its prediction,\n{classes[k]}", heat, colour)
        for axes, four, picture, heat in zip(grid[2:], groups, fours, maps, strict=False):
            show(axes[0], picture, "four in one")
            for k in range(4):
                place = ("upper left", "upper right", "lower left", "lower right")[k]
                bar = show(axes[k + 1], picture, f"map for {classes[labels[four[k]]]}\n({place})", heat[k])
        figure.colorbar(bar, ax=grid, shrink=0.4, label="evidence, of the largest in the map")
    print(f"of {len(own)} maps, each for one class of {len(groups)} mosaics: {np.mean(own):.0%} of the evidence "
          f"lies in the quarter that shows the class (without knowing where: 25%); drawn: {path}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(told(main))
