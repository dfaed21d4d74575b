"""One training run from the names of its parts: data, model and recipe in; log, checkpoints, weights and result out.

`run` is a list of phases: look at what could fail later, open the data, build the training, go on from a checkpoint,
train, write the weights, draw. Whatever ends it after the first step, the training is saved and the last line says how
to go on.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception import console, report
from inception.data import Augment, Dataset, Loader, mean_and_std, open_data, split
from inception.evaluate import Evaluation, evaluate, predictions
from inception.files import FileError, check_place
from inception.models import create_model
from inception.training.alarms import Watchdog
from inception.training.checkpoint import Checkpoint, CheckpointError, restore
from inception.training.directory import RunDirectory, check_free, write_somewhere
from inception.training.log import as_json, row_of
from inception.training.loop import Epoch, Stopped, Training
from inception.training.options import Run
from inception.training.signals import Signals
from inception.weights import check_suffix, is_shipped, save_weights
from minigrad import Tensor, backend, num_threads, ops
from minigrad.errors import NonFiniteError

# Pixels per evaluation batch on a GPU. Larger than a training batch, because launching small batches is limited by the
# host.
EVALUATED_PIXELS = 2**19


def run(options: Run, checkpoint: Checkpoint | None = None) -> Evaluation:
    """Train, print a line for each epoch, save the weights, and return the result on the test pictures.

    checkpoint   where to go on, if not from the start; `options` are then those of `resumed`
    Raises       Stopped after SIGINT, SIGTERM or SIGHUP: the training is saved, its message says how to go on;
                 NonFiniteError if a loss is NaN or Inf: it says where that begins, and the checkpoints are from before;
                 whatever else has ended the training, with a note (PEP 678) that says how to go on
    """
    resumed = checkpoint is not None
    if not resumed:
        options.recipe.check_momentum()
    check_names(options, resumed)
    sets = open_sets(options)
    training, tests = build(options, sets)
    about, data = describe(options, sets, training), fingerprint(sets)
    if checkpoint is not None:
        check_same_data(checkpoint, data, options.data)
        restore(checkpoint, training)
    check_place(options.weights_file)
    again = f" --save {shlex.quote(str(options.save))}" if options.save is not None else ""
    signals = Signals(training.stop, lambda: setattr(directory, "asked", True))
    directory = RunDirectory(training, about, {"options": options.to_json(), "data": data}, options.out,
                             watched=sets.watched_name, save_every=options.save_every, keep=options.keep,
                             tensorboard=options.tensorboard, resumed=resumed, again=again,
                             finished=signals.finished)  # fmt: skip
    teller = Teller(options, sets, training)
    with signals.listening(), directory, _saved_whatever_ends_it(directory, signals):
        teller.introduce(checkpoint)

        def after_epoch(epoch: Epoch) -> None:
            directory.after_epoch()
            teller.after_epoch(epoch)

        training.run(after_step=directory.after_step, after_epoch=after_epoch)
        result = _final_evaluation(options, training, tests)
        with training.averaged():
            with signals.finished():
                written = _write_weights(options, training, about | {"test_accuracy": result.accuracy}, directory)
            if options.out is not None and options.report:
                teller.say(_write_report(options.out, teller.rows(), training, tests))
    teller.conclude(result, written)
    return result


# ---- Before the first step ----


class Sets(NamedTuple):
    """The pictures of a run, and how they are normalised."""

    training: Dataset
    watched: Dataset  # evaluated on after every epoch
    test: Dataset  # evaluated on at the end
    watched_name: str  # "test" or "validation"
    mean: np.ndarray  # (3,)
    std: np.ndarray  # (3,)


def check_names(options: Run, resumed: bool) -> None:
    """Raise FileError where a name of the user's would overwrite a file or hide a model that is shipped."""
    path = options.weights_file
    if options.out is not None and not resumed:
        check_free(options.out)
    check_suffix(path)
    for flag, place in (("--out", options.out), ("--save", options.save)):
        if place is not None and is_shipped(place):
            raise FileError(f"{flag} {place}: a model of this name comes with the package: choose another name")
    if path.is_file() and not (resumed and options.save is None):
        remedy = "another file (--save)" if options.save is not None else "another directory (--out)"
        raise FileError(f"{path} exists already, and training would overwrite it: name {remedy}, or remove the file")


def open_sets(options: Run) -> Sets:
    """Open the data and look at every picture to evaluate on: a damaged one must not be found after an epoch."""
    quiet = options.quiet or options.json
    training, test = open_data(options.data, size=options.size, quiet=quiet)
    watched = test
    if options.validation:
        training, watched = split(training, options.validation, options.recipe.seed)
    mean, std = mean_and_std(training)
    for dataset in {id(found): found for found in (watched, test)}.values():
        if not isinstance(dataset.images, np.ndarray):  # files
            with console.progress(f"look at {dataset.name}", len(dataset), unit="img", quiet=quiet) as bar:
                for start in range(0, len(dataset), 64):
                    bar.update(len(dataset.images[start : start + 64]))
    return Sets(training, watched, test, "validation" if options.validation else "test", mean, std)


def build(options: Run, sets: Sets) -> tuple[Training, Loader]:
    """The training, and the batches of the test pictures."""
    recipe, quiet = options.recipe, options.quiet or options.json
    on_gpu, (height, width) = backend.backend() == "cupy", sets.training.images.shape[1:3]
    at_once = max(recipe.batch_size, EVALUATED_PIXELS // (height * width)) if on_gpu else recipe.batch_size
    tests = Loader(sets.test, at_once, mean=sets.mean, std=sets.std)
    watched = tests if sets.watched is sets.test else Loader(sets.watched, at_once, mean=sets.mean, std=sets.std)
    model = create_model(options.model, **_model_options(options, sets), seed=recipe.seed)
    graph = on_gpu if options.graph is None else options.graph
    training = Training(model, _training_loader(options, sets), recipe, test=watched,
                        test_average=options.test_average, graph=graph, quiet=quiet)  # fmt: skip
    if quiet and options.graph is None and training.graphed is not None:
        training.graphed.warn = lambda text: None  # nobody has asked for a graph
    return training, tests


def _model_options(options: Run, sets: Sets) -> dict[str, Any]:
    return {"num_classes": len(sets.training.classes), "aux_logits": options.aux_logits, "width": options.width}


def _training_loader(options: Run, sets: Sets) -> Loader:
    """Full batches in random order, changed as the recipe says."""
    recipe = options.recipe
    resized_crop: Any = recipe.resized_crop or None
    augment = Augment(recipe.padding, recipe.flip, recipe.cutout, recipe.jitter, resized_crop)
    return Loader(sets.training, recipe.batch_size, mean=sets.mean, std=sets.std, seed=recipe.seed,
                  augment=augment if recipe.augment else None, shuffle=True, drop_last=True,
                  prefetch=options.prefetch)  # fmt: skip


def describe(options: Run, sets: Sets, training: Training) -> dict[str, Any]:
    """What is worth knowing of the weights, for `save_weights`."""
    heads = any("aux" in name for name, _ in training.model.named_parameters())
    averaged = training.average is not None
    return {
        "model": options.model,
        "options": _model_options(options, sets) | {"aux_logits": heads},
        "classes": list(sets.training.classes),
        "mean": sets.mean.tolist(),
        "std": sets.std.tolist(),
        "size": list(sets.training.images.shape[1:3]),
        "data": sets.training.name,
        "command": options.command(),
        "weights": f"average over the training, decay {options.recipe.ema} a step" if averaged else "as trained",
    }


def fingerprint(sets: Sets) -> dict[str, Any]:
    """What a resumed run must find again, wherever its data have gone meanwhile, as plain JSON values."""
    found = {"classes": list(sets.training.classes), "mean": sets.mean.tolist(), "std": sets.std.tolist()}
    for prefix, dataset in (("", sets.training), ("test ", sets.test)):
        found[f"{prefix}number"] = len(dataset)
        found[f"{prefix}labels"] = hashlib.sha256(dataset.labels.astype("<i8").tobytes()).hexdigest()
        images: Any = dataset.images
        sources = getattr(images, "sources", images)
        if sources.dtype == object:  # paths
            names = "\n".join(os.path.basename(path) for path in sources)
            found[f"{prefix}file names"] = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        elif prefix:  # mean and std stand for the pixels of the training pictures
            found["test pixels"] = hashlib.sha256(np.ascontiguousarray(sources).data).hexdigest()
    return found


def check_same_data(checkpoint: Checkpoint, data: dict[str, Any], named: str) -> None:
    """Raise CheckpointError if the checkpoint was trained, or evaluated, on other pictures."""
    theirs = checkpoint.state["run"].get("data")
    known = theirs if isinstance(theirs, dict) else {"mean": None}  # those of older versions say less
    others = [name for name in data if known.get(name, data[name]) != data[name]]
    if others:
        done = "evaluated" if all(name.startswith("test ") for name in others) else "trained"
        raise CheckpointError(
            f"{checkpoint.path}: {done} on other pictures than --data {named}: not the same {', '.join(others)}"
        )


# ---- While it trains ----


class Teller:
    """Prints what happens: sentences, or JSON."""

    def __init__(self, options: Run, sets: Sets, training: Training):
        self.options, self.sets, self.training = options, sets, training
        self.watchdog = Watchdog(len(sets.training.classes))

    def say(self, text: str) -> None:
        """A sentence, where sentences are wanted."""
        if not (self.options.quiet or self.options.json):
            console.say(text)

    def introduce(self, checkpoint: Checkpoint | None) -> None:
        """What trains on what, and how to do the same again."""
        options, sets, training = self.options, self.sets, self.training
        parameters, classes = sum(p.size for p in training.model.parameters()), len(sets.training.classes)
        chance = math.log(classes)
        self.say(f"{options.model}: {parameters:,} parameters, {classes} classes (guessing has loss {chance:.3f})")
        pictures = f"{len(sets.training):,} pictures for training, {len(sets.watched):,} for evaluation"
        self.say(f"{sets.training.name}: {pictures}")
        where = f"{backend.backend()}, " + (f"{backend.precision()}, " if backend.backend() == "cupy" else "")
        self.say(f"{where}{num_threads()} threads; the same again: {options.command()}")
        if not (options.quiet or options.json) and training.loader.feed.where:
            self.say(training.loader.feed.where)
        if checkpoint is not None:
            steps = len(training.loader) * options.recipe.epochs
            self.say(f"going on from {checkpoint.path}: step {training.step:,} of {steps:,}")
        for epoch in training.epochs:  # before it was resumed
            self.watchdog.look(epoch.step, epoch.losses)

    def after_epoch(self, epoch: Epoch) -> None:
        """How the epoch went, and what is wrong."""
        self.say(sentence(epoch, self.sets.watched_name))
        if not self.options.quiet:
            waited = self.training.loader.waited
            alarms = self.watchdog.look(epoch.step, epoch.losses, waited=waited, seconds=epoch.seconds)
            layers = self.watchdog.look_at_layers(self.training.model, self.training.some_pictures())
            for alarm in [*alarms, *layers]:
                console.warning(alarm)
        if self.options.json:
            console.say(as_json(self._row(epoch)))

    def conclude(self, result: Evaluation, written: Path) -> None:
        """The result, and where the weights are."""
        kind = " (of the averaged weights)" if self.training.average is not None else ""
        self.say(f"test accuracy {result.accuracy:.2%}{kind}, loss {result.loss:.4f}; weights in {written}")
        if self.options.json:
            done = {"epochs": self.options.recipe.epochs, "step": self.training.step, "weights": str(written)}
            console.say(as_json({"test_loss": result.loss, "test_accuracy": result.accuracy, **done}))

    def rows(self) -> list[dict[str, Any]]:
        """The log."""
        return [self._row(epoch) for epoch in self.training.epochs]

    def _row(self, epoch: Epoch) -> dict[str, Any]:
        return row_of(epoch, watched=self.sets.watched_name, average=self.training.average is not None)


def sentence(epoch: Epoch, watched: str) -> str:
    """What is printed of an epoch."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in epoch.losses.items())
    parts = [f"epoch {epoch.number}: {losses}, accuracy {epoch.accuracy:.2%}"]
    if epoch.test is not None:
        parts.append(f"{watched} loss {epoch.test.loss:.4f}, accuracy {epoch.test.accuracy:.2%}")
    if epoch.average is not None:
        parts.append(f"averaged weights: loss {epoch.average.loss:.4f}, accuracy {epoch.average.accuracy:.2%}")
    return "; ".join([*parts, f"{epoch.seconds:.0f} s, {epoch.pictures_per_second:.0f} img/s"])


@contextmanager
def _saved_whatever_ends_it(directory: RunDirectory, signals: Signals) -> Iterator[None]:
    """What ends the block early leaves it with the training saved, where that can be, and says how to go on."""
    try:
        try:
            yield
        except Stopped as stop:
            directory.save()
            raise Stopped(stop.signal, directory.how_to_go_on("stopped")) from None
    except Stopped:
        raise
    except NonFiniteError as error:
        raise type(error)(f"{Exception.__str__(error)}; {directory.how_to_go_back()}", error.layer_path) from None
    except KeyboardInterrupt:  # the second one: there is no time to save
        raise Stopped(signals.first or signal.SIGINT, directory.how_to_go_on("stopped at once")) from None
    except BaseException as error:
        if note := directory.rescue():
            error.add_note(note)
        raise


# ---- After the last step ----


def _final_evaluation(options: Run, training: Training, tests: Loader) -> Evaluation:
    """The result on the test pictures: of the last epoch, or, if others were watched, counted now."""
    last = training.epochs[-1]
    result = last.average or last.test
    if options.validation:
        with training.averaged():
            result = evaluate(training.model, tests, quiet=training.quiet, check=training.check)
    assert result is not None
    return result


def _write_weights(options: Run, training: Training, about: dict[str, Any], directory: RunDirectory) -> Path:
    """Write the finished weights where the options say, or somewhere; return where they are."""

    def write(path: Path) -> None:
        save_weights(path, training.model, about)

    return write_somewhere(write, options.weights_file, directory.older())


def _write_report(directory: Path, rows: list[dict[str, Any]], training: Training, tests: Loader) -> str:
    """Draw the log and what the model makes of the test pictures; return what to say of it."""
    dataset = tests.dataset
    training.model.eval()
    try:
        report.matplotlib_()  # before the predictions are made
        chances = np.concatenate(
            [backend.to_host(ops.softmax(Tensor(logits)).data) for _, logits in predictions(training.model, tests)]
        )  # (N, K)
        confusion = report.confusion_matrix(dataset.labels, chances.argmax(axis=1), len(dataset.classes))
        mistakes = [(dataset.images[m.row], m) for m in report.worst_mistakes(chances, dataset.labels, 25)]
        files = report.write_report(directory, rows, confusion=confusion, classes=dataset.classes, mistakes=mistakes)
    except Exception as error:  # the weights are written: nothing that goes wrong with drawing is worth a failure
        return f"no report: {error}"
    return f"report: {', '.join(map(str, files))}"
