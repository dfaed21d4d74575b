"""The loop: epochs of steps, and the evaluation between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np

from inception import console
from inception.data import DataError, Loader, normalise
from inception.evaluate import Evaluation, evaluate, to_tensor
from inception.training.graph import GraphedStep
from inception.training.recipes import Recipe
from inception.training.step import Step, Sums
from minigrad import Tensor
from minigrad.nn import Module
from minigrad.random import Key


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


class Training(Step):
    """A model in training, epoch after epoch. A checkpoint holds all that changes in it.

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
        super().__init__(model, recipe, per_epoch=len(loader), batch_size=loader.batch_size)
        self.loader, self.test, self.test_average, self.quiet = loader, test, test_average, quiet
        self.epochs: list[Epoch] = []  # those that are complete, evaluation included
        self.stopping = 0  # number of the signal that wants `run` to stop
        self.graphed = GraphedStep(self, console.warning) if graph else None

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

    def stop(self, number: int) -> None:
        """Have `run` stop after the step that runs, as a signal of this number asks."""
        self.stopping = number

    def check(self) -> None:
        """Raise Stopped if this was asked to stop."""
        if self.stopping:
            raise Stopped(self.stopping)

    def _train_epoch(self, after_step: Callable[[], None]) -> None:
        """Take the steps of the epoch that are still to be taken."""
        number, steps, sums = len(self.epochs), len(self.loader), self.sums
        take_step = self.take_step if self.graphed is None else self.graphed.take_step
        self.model.train()
        title = f"epoch {number + 1}/{self.recipe.epochs}"
        total = steps * self.loader.batch_size
        with console.progress(title, total, unit="img", quiet=self.quiet, initial=sums.seen) as bar:
            started = time.perf_counter()
            for batch in self.loader.batches(number, start=self.step - number * steps):
                with self.counted():
                    take_step(batch)
                if bar.update(len(batch.labels)):  # drawn now: only then fetch numbers from the device
                    self.check_losses()
                    means = " ".join(f"{name} {value:.3f}" for name, value in sums.means().items())
                    bar.set_postfix_str(f"{means} acc {sums.accuracy():.1%}", refresh=False)
                sums.seconds += time.perf_counter() - started
                after_step()
                self.check()
                started = time.perf_counter()

    def some_pictures(self) -> Tensor:
        """The batch to look at layers with: the first pictures, as they are; `model` has the keys for it."""
        n = min(self.loader.batch_size, len(self.loader.dataset))
        rows = np.arange(n)
        self.model.set_key(Key(self.recipe.seed).fold("look"), rows)
        return to_tensor(normalise(self.loader.dataset.images[rows], self.loader.mean, self.loader.std))

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
