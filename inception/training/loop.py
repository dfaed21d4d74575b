"""The loop: epochs of steps, a step being forward, backward and update; and the evaluation between them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from inception.data import Batch, Loader
from minigrad import Tensor, backend, no_grad, ops, optim, schedule
from minigrad.errors import MinigradError
from minigrad.layout import Array, images, pixels
from minigrad.nn import Module
from minigrad.random import Key
from minigrad.threads import blas_on_one_thread


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are those of the small GoogLeNet on CIFAR-10.

    SGD with Nesterov momentum and weight decay on all parameters; the learning rate rises to `lr` and falls to
    nearly zero along half a cosine each, momentum mirrors it from 0.95 to 0.85 and back
    (Smith, Topin: Super-convergence, arXiv:1708.07120).
    """

    epochs: int = 4
    batch_size: int = 128
    lr: float = 0.1  # the peak
    peak_at: float = 0.3  # share of the steps before the peak
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    head_weight: float = 0.3  # of each auxiliary head's loss (arXiv:1409.4842, section 5)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("lr", 0), ("weight_decay", 0)):
            value = getattr(self, name)
            if not lowest <= value < math.inf:  # NaN fails too
                raise MinigradError(f"{name} must be at least {lowest} and finite, got {value}")


class Evaluation(NamedTuple):
    """How a model does on a data set."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of pictures whose largest logit is the label's


class Epoch(NamedTuple):
    """What is reported after each epoch."""

    number: int  # from 1
    losses: dict[str, float]  # mean over the epoch's steps, of the classifier ("loss") and each head
    accuracy: float  # on the augmented training pictures, as they went by
    lr: float  # at the last step
    seconds: float  # of training
    pictures_per_second: float
    test: Evaluation | None


def train(
    model: Module,
    loader: Loader,
    recipe: Recipe,
    *,
    test: Loader | None = None,
    quiet: bool = False,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `model` in place by `recipe`; evaluate it on `test` after every epoch.

    quiet        no progress bar
    after_epoch  called with each epoch's report
    """
    optimizer = optim.SGD(model.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    total = recipe.epochs * len(loader)
    lr, momentum = schedule.one_cycle(total, recipe.peak_at), schedule.one_cycle_momentum(total, recipe.peak_at)
    key = Key(recipe.seed).fold("dropout")
    reports = []
    for epoch in range(recipe.epochs):
        model.train()
        sums, seen, correct = _Sums(), 0, None
        started = time.perf_counter()
        with _bar(f"epoch {epoch + 1}/{recipe.epochs}", len(loader) * loader.batch_size, quiet) as bar:
            for i, batch in enumerate(loader.batches(epoch)):
                step = epoch * len(loader) + i
                model.set_key(key.fold(step), batch.rows)
                with blas_on_one_thread():
                    losses, hits = training_step(model, batch, recipe)
                    optimizer.step(lr=recipe.lr * lr(step), momentum=momentum(step))
                    optimizer.zero_grad()
                seen += len(batch.labels)
                correct = hits if correct is None else correct + hits
                sums.add(losses)
                if bar.update(len(batch.labels)):  # drawn now: only then fetch numbers from the device
                    means = " ".join(f"{name} {value:.3f}" for name, value in sums.means().items())
                    bar.set_postfix_str(f"{means} acc {float(correct) / seen:.1%}", refresh=False)
        seconds = time.perf_counter() - started
        report = Epoch(
            epoch + 1,
            sums.means(),
            float(correct) / seen if correct is not None else 0.0,
            recipe.lr * lr(total * (epoch + 1) // recipe.epochs - 1),
            seconds,
            seen / seconds,
            evaluate(model, test, quiet=quiet) if test is not None else None,
        )
        reports.append(report)
        after_epoch(report)
    return reports


def training_step(model: Module, batch: Batch, recipe: Recipe) -> tuple[dict[str, Array], Array]:
    """Forward and backward. Returns the loss of each output (0-d arrays), and how many pictures were right."""
    labels = backend.asarray(batch.labels)
    outputs = model(to_tensor(batch.images))
    named = {"loss": outputs} if isinstance(outputs, Tensor) else outputs._asdict()
    losses = {
        name: ops.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        for name, logits in named.items()
    }
    *heads, main = losses  # the classifier comes last, its losses under the name "logits" beside heads
    total = losses[main]
    for head in heads:
        total = total + losses[head] * recipe.head_weight
    total.backward()
    hits = (named[main].data.argmax(axis=1) == labels).sum()
    return {"loss": losses[main].data, **{head: losses[head].data for head in heads}}, hits


def evaluate(model: Module, loader: Loader, *, quiet: bool = False) -> Evaluation:
    """Loss and accuracy of `model` in evaluation mode over the whole loader; the mode is put back."""
    mode = model.training
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    try:
        with _bar("evaluate", len(loader.dataset), quiet) as bar:
            for batch, logits in predictions(model, loader):
                labels = backend.asarray(batch.labels)
                n = len(batch.labels)
                loss += ops.cross_entropy(Tensor(logits), labels).item() * n
                correct += int((logits.argmax(axis=1) == labels).sum())
                seen += n
                bar.update(n)
    finally:
        model.train(mode)
    return Evaluation(loss / max(seen, 1), correct / max(seen, 1))


def predictions(model: Module, loader: Loader) -> Iterator[tuple[Batch, Array]]:
    """Each batch of the loader with the model's logits (N, K), without recording a graph."""
    for batch in loader.batches(0):
        with no_grad():  # which must end before the yield, or it would hold for the caller
            logits = model(to_tensor(batch.images)).data
        yield batch, logits


def to_tensor(pictures: Array) -> Tensor:
    """A host batch (N, C, H, W) as a tensor of the default backend, channels-last there too."""
    n, _, h, w = pictures.shape
    return Tensor(images(backend.asarray(pixels(pictures)), n, h, w))


class _Sums:
    """Running means of named losses, kept on the device until somebody asks."""

    def __init__(self) -> None:
        self.totals: dict[str, Array] = {}
        self.steps = 0

    def add(self, losses: dict[str, Array]) -> None:
        self.totals = {name: self.totals.get(name, 0.0) + value for name, value in losses.items()}
        self.steps += 1

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.totals.items()}


def _bar(title: str, total: int, quiet: bool) -> tqdm:
    return tqdm(desc=title, total=total, unit="img", disable=quiet, leave=False, dynamic_ncols=True, file=sys.stderr)
