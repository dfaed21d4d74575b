#!/usr/bin/env python3
"""Where does the network look? Grad-CAM (Selvaraju et al., arXiv:1610.02391) of its last grid, as a PNG.

    heat[i, j] = max(0, Σ_c w[c] · A[c, i, j]),   w[c] = the mean over the pixels of d logit / d A[c]

A is what goes into the average pool. Its gradient is that of an activation: `retain_grad` asks for it.
"""

from __future__ import annotations

import sys

import numpy as np
from subject import parser, subject, told

from inception.training.report import drawing
from minigrad import Tensor, nn
from minigrad.backend import to_host


class Kept(nn.Module):
    """A layer that keeps what it was given, and asks for its gradient."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.retain_grad()
        return self.layer(x)


def main() -> None:
    words = parser(__doc__, "gradcam")
    words.add_argument("--pictures", type=int, default=10, help="how many to draw (%(default)s)")
    options = words.parse_args()
    look = subject(options)
    rows = np.arange(min(options.pictures, len(look.dataset)))
    pictures, labels, classes = look.dataset.images[rows], look.dataset.labels[rows], look.dataset.classes
    model = look.model
    kept = Kept(model.avgpool)
    model.avgpool = kept
    logits = model(look.batch(rows))
    said = to_host(logits.data).argmax(axis=1)
    chosen = np.zeros(logits.shape, np.float32)
    chosen[rows, said] = 1
    (logits * Tensor(chosen)).sum().backward()  # no picture's logit depends on another's pixels: one pass does for all
    a, gradient = to_host(kept.seen.data), to_host(kept.seen.grad)
    heat = np.maximum((gradient.mean((2, 3), keepdims=True) * a).sum(1), 0)  # (N, H, W)
    heat /= heat.max((1, 2), keepdims=True) + 1e-12
    path = options.out / "gradcam.png"
    columns_ = min(5, len(rows))
    with drawing(path, 1.9 * columns_, 4.1 * -(-len(rows) // columns_)) as figure:
        for grid, start in zip(
            np.atleast_1d(figure.subfigures(-(-len(rows) // columns_), 1)), rows[::columns_], strict=True
        ):
            axes = grid.subplots(2, columns_, squeeze=False)
            for axis in axes.ravel():
                axis.set_axis_off()
            for i, (above, below) in zip(rows[start : start + columns_], axes.T, strict=False):
                h, w = pictures[i].shape[:2]
                above.imshow(pictures[i])
                below.imshow(pictures[i].mean(2), cmap="gray")
                below.imshow(
                    heat[i], cmap="inferno", alpha=0.6, extent=(-0.5, w - 0.5, h - 0.5, -0.5), interpolation="bilinear"
                )
                right = said[i] == labels[i]
                above.set_title(classes[labels[i]], size=9)
                below.set_title(
                    f"{'recognised' if right else '→ ' + classes[said[i]]}",
                    size=9,
                    color="black" if right else "#D55E00",
                )
    h, w = heat.shape[1:]
    print(f"{(said == labels).mean():.0%} of {len(rows)} pictures recognised; heat on a {h}×{w} grid; drawn: {path}")


if __name__ == "__main__":
    sys.exit(told(main))
