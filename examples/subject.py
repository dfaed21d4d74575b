"""What the examples look at: a trained model, and pictures it was not trained on.

The model comes from a weights file (--weights, as `python -m inception train` writes it), or is trained here within
about a minute, on shapes, and kept in the folder of the drawings (--out), so that the next example can begin with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inception.data import Dataset, Loader, Preprocessing, load_shapes, mean_and_std, normalise, open_data
from inception.models import create_model
from inception.training import RECIPES, Training, to_tensor
from inception.training.report import matplotlib_
from inception.weights import load_model, save_weights
from minigrad import Tensor
from minigrad.errors import MinigradError
from minigrad.nn import Module

# A quarter of the published widths: about 1/16 of the cost.
QUICK = {"model": "googlenet_small", "options": {"num_classes": 10, "aux_logits": False, "width": 0.25}}


class Subject(NamedTuple):
    """A model in evaluation mode, and pictures."""

    model: Module
    dataset: Dataset
    mean: np.ndarray  # (3,), of pixels in [0, 1]
    std: np.ndarray

    def batch(self, rows: np.ndarray, *, requires_grad: bool = False) -> Tensor:
        """The pictures `rows` as the network reads them, (N, 3, H, W)."""
        x = to_tensor(normalise(self.dataset.images[rows], self.mean, self.std))
        return Tensor(x.data, requires_grad)

    def picture(self, x: np.ndarray) -> np.ndarray:
        """A normalised picture (3, H, W) as one to look at, (H, W, 3) in [0, 1]: the way back from `batch`."""
        return np.clip(x.transpose(1, 2, 0) * self.std + self.mean, 0, 1)


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options that all examples have. `description` is the script's docstring."""
    words = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--weights", type=Path, help="a trained model (default: train a small one now, on shapes)")
    words.add_argument("--data", default="shapes", help="what to look at: see `python -m inception train --help`")
    words.add_argument("--out", type=Path, default=Path("runs") / out, help="folder for the drawings (%(default)s)")
    words.add_argument("--train", type=int, default=12000, help="shapes to train on, without --weights (%(default)s)")
    return words


def subject(options: argparse.Namespace) -> Subject:
    """The model and the pictures that the options name, for an example that draws."""
    matplotlib_()  # before a minute of training, not after it, is the time to miss it
    if options.weights is None:
        options.weights = options.out / "weights.npz"
        train(options.train, options.weights)
    model, about = load_model(options.weights)
    prepared = Preprocessing.of(about)
    pictures = load_shapes(0, 500)[1] if options.data == "shapes" else open_data(options.data)[1]
    return Subject(model, prepared.dataset(pictures), np.array(prepared.mean), np.array(prepared.std))


def train(pictures: int, weights: Path) -> None:
    """Train QUICK once on so many shapes, and write its weights."""
    started = time.perf_counter()
    shapes, _ = load_shapes(pictures, 0)
    recipe = dataclasses.replace(RECIPES["shapes"], batch_size=min(32, pictures), optimizer="adamw", lr=0.01)
    print(f"training {QUICK['model']} at a quarter of its widths on {pictures:,} shapes, once (--weights spares it) …")
    mean, std = mean_and_std(shapes)
    loader = Loader(shapes, recipe.batch_size, mean=mean, std=std, shuffle=True, drop_last=True)
    model = create_model(QUICK["model"], **QUICK["options"])
    training = Training(model, loader, recipe)
    training.run()
    seen = training.epochs[-1]
    weights.parent.mkdir(parents=True, exist_ok=True)
    about = {"classes": list(shapes.classes), "mean": mean.tolist(), "std": std.tolist(), "size": [32, 32]}
    save_weights(weights, model, QUICK | about)
    print(f"  {time.perf_counter() - started:.0f} s, loss {seen.losses['loss']:.2f} on the way; kept in {weights}")


def told(main: Callable[[], None]) -> int:
    """Run an example: 0, or 1 after one sentence on what was wrong."""
    try:
        main()
    except (MinigradError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
