"""The loop: epochs of steps, a step being forward, backward and update; and the evaluation between them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from inception.data import Batch, DataError, Loader, normalise
from inception.training.average import Average
from inception.training.graph import GraphedStep
from inception.training.recipes import Recipe
from minigrad import Tensor, backend, first_non_finite, no_grad, ops
from minigrad.errors import NonFiniteError, ShapeError
from minigrad.layout import Array, images, pixels
from minigrad.nn import Module
from minigrad.random import Key
from minigrad.threads import blas_on_one_thread


class Evaluation(NamedTuple):
    """How a model does on a data set."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of pictures whose largest logit is the label's


class Epoch(NamedTuple):
    """What is reported after each epoch."""

    number: int  # from 1
    step: int  # steps since the start of the training
    lr: float  # at the last step
    losses: dict[str, float]  # mean over the epoch's steps, of the classifier ("loss") and each head
    accuracy: float  # on the augmented training pictures, as they went by
    seconds: float  # of training, without evaluating and saving
    pictures_per_second: float
    test: Evaluation | None = None
    average: Evaluation | None = None  # of the averaged weights, where there are any and they were asked for


class Stopped(Exception):
    """Training was asked to stop by a signal of this number, and stands between two steps."""

    def __init__(self, signal: int, message: str = ""):
        super().__init__(message)
        self.signal = signal


class Training:
    """A model in training: all that changes from step to step, which is also what a checkpoint holds.

    model, loader, recipe   are trained in place, on the batches, by the recipe
    test                    to evaluate on after every epoch
    test_average            evaluate the averaged weights too after every epoch, not only after the last
    graph                   on a GPU: repeat the step as one CUDA graph, see `GraphedStep`
    quiet                   no progress bars

    Raises DataError if the loader has no batch.
    """

    def __init__(
        self,
        model: Module,
        loader: Loader,
        recipe: Recipe,
        *,
        test: Loader | None = None,
        test_average: bool = False,
        graph: bool = False,
        quiet: bool = False,
    ):
        if not len(loader):
            raise DataError(
                f"{loader.dataset.name}: {len(loader.dataset)} training pictures do not fill a batch of "
                f"{loader.batch_size}: lower the batch size (--batch-size)"
            )
        self.model, self.loader, self.recipe, self.test = model, loader, recipe, test
        self.test_average, self.quiet = test_average, quiet
        self.optimizer = recipe.make_optimizer(model)
        self.clip = {"max_norm": recipe.clip_norm} if recipe.clip_norm else {}
        self.average: Average | None = None
        if recipe.ema:
            self.average = Average(model, recipe.ema, recipe.ema_every, self.optimizer.arenas)
        self.lr, self.momentum = recipe.make_schedules(len(loader))
        self.key = Key(recipe.seed).fold("dropout")
        self.step = 0
        self.epochs: list[Epoch] = []  # those that are complete, evaluation included
        self.sums = Sums()  # over the one that runs
        self.stopping = 0  # the number of a signal: set it, from its handler for example, to have `run` stop soon
        self.graphed = GraphedStep(self, warn) if graph else None

    def run(
        self,
        *,
        after_step: Callable[[], None] = lambda: None,
        after_epoch: Callable[[Epoch], None] = lambda epoch: None,
    ) -> None:
        """Train from where this stands to the end of the recipe. Raises Stopped if it was asked to stop."""
        with self.graphed.on_its_stream() if self.graphed is not None else nullcontext():
            while len(self.epochs) < self.recipe.epochs:
                self._train_epoch(after_step)
                epoch = self._report()
                self.epochs.append(epoch)
                self.sums = Sums()
                after_epoch(epoch)

    def check(self) -> None:
        """Raise Stopped if this was asked to stop."""
        if self.stopping:
            raise Stopped(self.stopping)

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the model has its averaged weights, if the recipe averages them."""
        return self.average.applied() if self.average is not None else nullcontext()

    def _train_epoch(self, after_step: Callable[[], None]) -> None:
        """Take the steps of the epoch that are still to be taken."""
        number, steps, sums = len(self.epochs), len(self.loader), self.sums
        take_step = self.take_step if self.graphed is None else self.graphed.take_step
        self.model.train()
        title = f"epoch {number + 1}/{self.recipe.epochs}"
        with _bar(title, steps * self.loader.batch_size, self.quiet, sums.seen) as bar:
            started = time.perf_counter()
            for batch in self.loader.batches(number, start=self.step - number * steps):
                take_step(batch)
                if self.average is not None:
                    self.average.update(self.step)
                self.step += 1
                if bar.update(len(batch.labels)):  # drawn now: only then fetch numbers from the device
                    self.check_losses()
                    means = " ".join(f"{name} {value:.3f}" for name, value in sums.means().items())
                    bar.set_postfix_str(f"{means} acc {sums.accuracy():.1%}", refresh=False)
                sums.seconds += time.perf_counter() - started
                after_step()
                self.check()
                started = time.perf_counter()

    def take_step(self, batch: Batch) -> None:
        """Forward, backward and update on a batch, with the random numbers of this step."""
        self.model.set_key(self.key.fold(self.step), batch.rows)
        self.compute(batch)

    def compute(self, batch: Batch) -> None:
        """A step, with the random numbers that the model has been handed."""
        with blas_on_one_thread():
            losses, hits = training_step(self.model, batch, self.recipe)
            self._check_step(batch, losses)
            self._update()
        self.sums.add(losses, hits, len(batch.labels))

    def check_losses(self) -> None:
        """Raise NonFiniteError if a loss of the running epoch is not finite. The host waits for the device here."""
        for name, mean in self.sums.means().items():
            if not math.isfinite(mean):
                raise NonFiniteError(
                    f"{name} is {mean}, seen at step {self.step:,}: on a GPU losses are fetched now and then only, and "
                    "the updates since have spread it to all weights, so that the layer where it began is not known",
                    "",
                )

    def some_pictures(self) -> Tensor:
        """The batch to look at layers with: the first pictures, as they are; `model` has the keys for it."""
        n = min(self.loader.batch_size, len(self.loader.dataset))
        rows = np.arange(n)
        self.model.set_key(Key(self.recipe.seed).fold("look"), rows)
        return to_tensor(normalise(self.loader.dataset.images[rows], self.loader.mean, self.loader.std))

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

    def _update(self) -> None:
        """Move the weights along the gradients they have, and forget those."""
        self.optimizer.step(**self.rates(), **self.clip)
        self.optimizer.zero_grad()

    def rates(self) -> dict[str, float]:
        """What the optimizer is told of this step: its learning rate, and its momentum where the recipe moves that."""
        return {"lr": self.lr(self.step)} | ({} if self.momentum is None else {"momentum": self.momentum(self.step)})

    def _report(self) -> Epoch:
        started = time.perf_counter()
        self.check_losses()
        losses, accuracy = self.sums.means(), self.sums.accuracy()  # the host waits for the device here
        self.sums.seconds += time.perf_counter() - started
        number, seconds = len(self.epochs) + 1, self.sums.seconds
        test = average = None
        if self.test is not None:
            test = evaluate(self.model, self.test, quiet=self.quiet, check=self.check)
            if self.average is not None and (self.test_average or number == self.recipe.epochs):
                with self.averaged():
                    average = evaluate(self.model, self.test, quiet=self.quiet, check=self.check)
        rate = self.sums.seen / seconds
        return Epoch(number, self.step, self.lr(self.step - 1), losses, accuracy, seconds, rate, test, average)


def train(
    model: Module,
    loader: Loader,
    recipe: Recipe,
    *,
    test: Loader | None = None,
    quiet: bool = False,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `model` in place by `recipe`, evaluate it on `test` after every epoch, and return what was reported.

    quiet        no progress bar
    after_epoch  called with each epoch's report
    """
    training = Training(model, loader, recipe, test=test, quiet=quiet)
    training.run(after_epoch=after_epoch)
    return training.epochs


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


class Tally(NamedTuple):
    """A data set's pictures counted by their class."""

    loss: float  # summed cross-entropy
    right: np.ndarray  # (K,) int64, of each class those that were recognised
    seen: np.ndarray  # (K,) int64, of each class


def tally(model: Module, loader: Loader, *, quiet: bool = False, check: Callable[[], None] = lambda: None) -> Tally:
    """Count what `model` recognises in evaluation mode, over the whole loader; the mode is put back.

    check   called between batches: what it raises ends the count
    """
    mode = model.training
    model.eval()
    classes = len(loader.dataset.classes)
    loss, right, seen = 0.0, np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    try:
        with _bar("evaluate", len(loader.dataset), quiet) as bar:
            for batch, logits in predictions(model, loader):
                labels = backend.asarray(batch.labels)
                n = len(batch.labels)
                loss += ops.cross_entropy(Tensor(logits), labels).item() * n
                hits = backend.to_host(logits.argmax(axis=1) == labels)
                right += np.bincount(batch.labels[hits], minlength=classes)
                seen += np.bincount(batch.labels, minlength=classes)
                bar.update(n)
                check()
    finally:
        model.train(mode)
    return Tally(loss, right, seen)


def evaluate(
    model: Module, loader: Loader, *, quiet: bool = False, check: Callable[[], None] = lambda: None
) -> Evaluation:
    """Loss and accuracy of `model`, counted as by `tally`."""
    loss, right, seen = tally(model, loader, quiet=quiet, check=check)
    n = max(int(seen.sum()), 1)
    return Evaluation(loss / n, int(right.sum()) / n)


def predictions(model: Module, loader: Loader) -> Iterator[tuple[Batch, Array]]:
    """Each batch of the loader with the model's logits (N, K), without recording a graph."""
    for batch in loader.batches(0):
        with no_grad():  # which must end before the yield, or it would hold for the caller
            logits = model(to_tensor(batch.images)).data
        yield batch, logits


def to_tensor(pictures: Array) -> Tensor:
    """A host batch (N, C, H, W) as a tensor of the default backend, channels-last there too."""
    if pictures.ndim != 4:
        raise ShapeError(f"to_tensor wants a batch (N, C, H, W), got {pictures.shape}: x[None] makes one of a picture")
    n, _, h, w = pictures.shape
    return Tensor(images(backend.asarray(pixels(pictures)), n, h, w))


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


def warn(text: str) -> None:
    """Say on standard error what is wrong and does not end the training."""
    tqdm.write(f"warning: {text}", file=sys.stderr)  # above a progress bar


def _bar(title: str, total: int, quiet: bool, initial: int = 0) -> tqdm:
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # in a file every state of the bar is a line
    return tqdm(desc=title, total=total, initial=initial, unit="img", disable=quiet, leave=False, dynamic_ncols=True,
                file=sys.stderr, mininterval=seconds)  # fmt: skip
