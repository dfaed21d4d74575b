"""The command line with the cheapest model and data that have all that matters, so that a run takes a moment.

`python tests/tiny_run.py train --out DIR …` is what the tests of checkpoints start, stop and kill.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception.__main__ import main
from inception.data import Dataset, load_shapes
from inception.training import Recipe, Run, open_checkpoint, resumed, run
from inception.training.checkpoint import BEST, find_checkpoints
from inception.weights import CHECKPOINT, read_arrays
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


# ---- The same run within a test ----

RECIPE = Recipe(epochs=4, batch_size=8, ema=0.9, ema_every=2, clip_norm=1.0, seed=3)


def options(out: Path, **changes: Any) -> Run:
    defaults: dict[str, Any] = {"aux_logits": True, "recipe": RECIPE, "save_every": 2, "report": False, "quiet": True}
    return Run(out=out, **defaults | changes)


def go_on(where: Path, **given: Any) -> None:
    checkpoint = open_checkpoint(where)
    run(resumed(checkpoint, {"quiet": True} | given), checkpoint)


def timeless(value: Any) -> Any:
    """A JSON value without what the clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "pictures_per_second")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def outcome(out: Path) -> dict[str, Any]:
    """All that a run leaves: every array to the last bit, what describes them, and the log."""
    found: dict[str, Any] = {}
    for path in (out / "weights.npz", out / BEST, *find_checkpoints(out)[:1]):
        for name, array in read_arrays(path).items():
            described = name.endswith(".json")
            value = timeless(json.loads(array.item())) if described else (array.dtype.str, array.shape, array.tobytes())
            if name == CHECKPOINT:  # these may differ between runs of the same training
                for option in ("data", "save_every", "keep", "prefetch", "tensorboard", "report"):
                    value["run"]["options"].pop(option, None)
            found[f"{path.name}: {name}"] = value
    found["log"] = [timeless(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]
    table = (out / "log.csv").read_text().splitlines()
    found["table"] = [row.split(",")[:-2] for row in table]
    return found


def assert_same(out: Path, reference: dict[str, Any]) -> None:
    found = outcome(out)
    assert found.keys() == reference.keys()
    assert [name for name in reference if found[name] != reference[name]] == []


# ---- As a command ----

ROOT = Path(__file__).parents[1]


def start(*arguments: Any, how: tuple[str, ...] = (), **environment: Any) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MINIGRAD_NUM_THREADS": "1", "MINIGRAD_BACKEND": "numpy"}
    command = [*how, sys.executable, "-u", "-W", "error", str(ROOT / "tests" / "tiny_run.py"), *map(str, arguments)]
    variables |= {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(child: subprocess.Popen[str], words: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}: {child.communicate()[1]}")


def slow(module: Any, name: str, seconds: float) -> None:
    plain = getattr(module, name)

    def waiting(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return plain(*args, **options)

    setattr(module, name, waiting)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    run_module = importlib.import_module("inception.training.run")
    run_module.create_model, run_module.open_data = make_model, make_data
    slow(os, "fsync", float(os.environ.get("SLOW_SAVE", 0)))
    slow(importlib.import_module("inception.training.step"), "training_step", float(os.environ.get("SLOW_STEP", 0)))
    if limit := os.environ.get("LARGEST_FILE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.exit(main())
