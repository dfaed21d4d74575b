"""The command line with the cheapest model and data that have all that matters, so that a run takes a moment.

`python tests/tiny_run.py train --out DIR …` is what the tests of checkpoints start, stop and kill.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import resource
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from inception.__main__ import main
from inception.data import Dataset, load_shapes
from minigrad import Tensor, nn, ops
from minigrad.random import seeded

_OPTIONS = "--recipe cifar_small --aux --epochs 4 --batch-size 8 --ema 0.9 --ema-every 2 --clip-norm 1 --seed 3"
OPTIONS = [*_OPTIONS.split(), "--save-every", "2", "--no-report"]
STEPS = 6  # in an epoch


class Outputs(NamedTuple):
    aux1: Tensor
    aux2: Tensor
    logits: Tensor


class Net(nn.Module):
    """A convolution, batch norm, dropout, a classifier, and two heads on request."""

    def __init__(self, classes: int, heads: bool, seed: int) -> None:
        with seeded(seed):
            self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm2d(6, relu=True)
            if heads:
                self.aux1, self.aux2 = nn.Linear(6, classes), nn.Linear(6, classes)
            self.dropout = nn.Dropout(0.3)
            self.fc = nn.Linear(6, classes)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor | Outputs:
        x = ops.global_avg_pool2d(self.norm(self.conv(x))).flatten()
        y = self.fc(self.dropout(x))
        return Outputs(self.aux1(x), self.aux2(x), y) if self.heads and self.training else y


def make_model(name: str, *, num_classes: int, aux_logits: bool | None, width: float = 1.0, seed: int = 0) -> Net:
    return Net(num_classes, bool(aux_logits), seed)


def make_data(source: str, **_: Any) -> tuple[Dataset, Dataset]:
    """Every second pixel of a few shapes: 6 batches of 8, and 12 pictures to evaluate on."""
    first, second = (
        dataclasses.replace(s, images=np.ascontiguousarray(s.images[:, ::2, ::2])) for s in load_shapes(50, 12)
    )
    return first, second


def slow(module: Any, name: str, seconds: float) -> None:
    plain = getattr(module, name)

    def waiting(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return plain(*args, **options)

    setattr(module, name, waiting)


if __name__ == "__main__":
    run_module = importlib.import_module("inception.training.run")
    run_module.create_model, run_module.open_data = make_model, make_data
    slow(os, "fsync", float(os.environ.get("SLOW_SAVE", 0)))
    slow(importlib.import_module("inception.training.loop"), "training_step", float(os.environ.get("SLOW_STEP", 0)))
    if limit := os.environ.get("LARGEST_FILE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.exit(main())
