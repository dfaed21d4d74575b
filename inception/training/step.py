"""One training step: forward, backward, update; and what the steps of an epoch add up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np

from inception.data import Batch
from inception.evaluate import to_tensor
from inception.training.average import Average
from inception.training.recipes import Recipe
from minigrad import Tensor, backend, first_non_finite, ops
from minigrad.errors import NonFiniteError
from minigrad.layout import Array
from minigrad.nn import Module
from minigrad.random import Key


class Step:
    """A model and what a recipe does to it with each batch: all that changes from step to step.

    model        is trained in place
    per_epoch    steps in an epoch, for schedules that count epochs
    batch_size   pictures in a batch, but for a last one that is smaller
    """

    def __init__(self, model: Module, recipe: Recipe, *, per_epoch: int, batch_size: int):
        self.model, self.recipe, self.batch_size = model, recipe, batch_size
        self.optimizer = recipe.make_optimizer(model)
        self.clip = {"max_norm": recipe.clip_norm} if recipe.clip_norm else {}
        self.average: Average | None = None
        if recipe.ema:
            self.average = Average(model, recipe.ema, recipe.ema_every, self.optimizer.arenas)
        self.lr, self.momentum = recipe.make_schedules(per_epoch)
        self.key = Key(recipe.seed).fold("dropout")
        self.buffers = [buffer for _, buffer in model.named_buffers()]
        self.step = 0  # steps taken
        self.sums = Sums()  # over the epoch that runs
        self.updating = False  # the step that runs has begun to change the weights
        self.intact = True  # this stands between two steps: training goes on from here bit for bit

    @contextmanager
    def counted(self) -> Iterator[None]:
        """The block takes one step. If forward or backward fail, this stands where it stood before that step.

        If the update fails, or, on a GPU, anything, this is not `intact` any more. (There, keeping the buffers would
        start more kernels than a small network's step has.)
        """
        host = all(isinstance(buffer.data, np.ndarray) for buffer in self.buffers)
        before = [buffer.data.copy() for buffer in self.buffers] if host else []
        self.updating = self.intact = False
        try:
            yield
        except BaseException:
            if host and not self.updating:
                for buffer, values in zip(self.buffers, before, strict=True):
                    buffer.data[...] = values
                self.optimizer.zero_grad()
                self.intact = True
            raise
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1
        self.intact = True

    def take_step(self, batch: Batch) -> None:
        """Forward, backward and update on a batch, with the random numbers of this step."""
        self.model.set_key(self.key.fold(self.step), batch.rows)
        self.compute(batch)

    def compute(self, batch: Batch) -> None:
        """A step, with the random numbers that the model has been handed."""
        losses, hits = training_step(self.model, batch, self.recipe)
        self._check_step(batch, losses)
        self._update()
        self.sums.add(losses, hits, len(batch.labels))

    def _update(self) -> None:
        """Move the weights along the gradients they have, and forget those."""
        self.updating = True
        self.optimizer.step(**self.rates(), **self.clip)
        self.optimizer.zero_grad()

    def rates(self) -> dict[str, float]:
        """What the optimizer is told of this step: its learning rate, and its momentum where the recipe moves that."""
        return {"lr": self.lr(self.step)} | ({} if self.momentum is None else {"momentum": self.momentum(self.step)})

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model has its averaged weights, if the recipe averages them."""
        return self.average.applied() if self.average is not None else nullcontext()

    def check_losses(self) -> None:
        """Raise NonFiniteError if a loss of the running epoch is not finite. The host waits for the device here."""
        for name, mean in self.sums.means().items():
            if not math.isfinite(mean):
                raise NonFiniteError(
                    f"{name} is {mean}, seen at step {self.step:,}: on a GPU losses are fetched now and then only, and "
                    "the updates since have spread it to all weights, so that the layer where it began is not known",
                    "",
                )

    def _check_step(self, batch: Batch, losses: Mapping[str, Array]) -> None:
        """Raise NonFiniteError before the update if a loss is not finite, naming the layer where that begins.

        Only where it is on the host anyway: to ask a device would be to wait for it at every step.
        """
        bad = {name: loss for name, loss in losses.items() if isinstance(loss, np.ndarray) and not np.isfinite(loss)}
        for name, loss in bad.items():
            error = first_non_finite(self.model, lambda: training_step(self.model, batch, self.recipe))
            where = "every op is finite in a second run of the step" if error is None else Exception.__str__(error)
            path = "" if error is None else error.layer_path
            raise NonFiniteError(f"{where}; {name} is {float(loss)} in step {self.step + 1:,}", path)


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


class Sums:
    """What an epoch adds up, kept on the device until somebody asks."""

    def __init__(self) -> None:
        self.totals: dict[str, Array] = {}  # of each loss, over the steps
        self.hits: Array | int = 0
        self.steps = self.seen = 0
        self.seconds = 0.0

    def add(self, losses: dict[str, Array], hits: Array, n: int) -> None:
        for name, value in losses.items():
            total = self.totals.get(name)
            if total is None:
                self.totals[name] = value + 0.0  # memory of its own, in which the others are added
            else:
                total += value
                self.totals[name] = total
        self.hits += hits
        self.count(n)

    def count(self, n: int) -> None:
        self.steps += 1
        self.seen += n

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.steps for name, total in self.totals.items()}

    def accuracy(self) -> float:
        return float(self.hits) / self.seen if self.seen else 0.0
