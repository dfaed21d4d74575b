"""One training run from the names of its parts: data, model and recipe in; log, checkpoints, weights and result out."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from inception.data import Augment, Dataset, Loader, mean_and_std, open_data, split
from inception.files import check_place
from inception.models import create_model
from inception.training import report
from inception.training.alarms import Watchdog
from inception.training.checkpoint import Checkpoint, CheckpointError, Keeper, restore
from inception.training.log import Row, as_json, row_of
from inception.training.loop import Epoch, Evaluation, Stopped, Training, evaluate, predictions, warn
from inception.training.recipes import RECIPES, Recipe
from inception.weights import check_suffix, save_weights
from minigrad import Tensor, backend, num_threads, ops
from minigrad.errors import MinigradError, NonFiniteError, no_such
from minigrad.nn import Module


@dataclass(frozen=True)
class Run:
    """What to train on what, and where the result goes.

    data          what `open_data` reads: "shapes", "cifar10", a directory, …
    size          pixels on a side to which the pictures of folders are brought; other data have their own size
    width         multiplies the widths of the model's layers, as in `create_model`
    validation    share of the training pictures set aside; each epoch is then evaluated on them, and the test
                  pictures are seen once, at the end. With 0 each epoch is evaluated on the test pictures.
    test_average  evaluate the averaged weights too after every epoch, not only after the last
    out           directory of log and checkpoints, of no other run; None: neither is written
    weights       the .npz to write; None: weights.npz in `out`
    save_every    steps between two checkpoints; there is one after every epoch anyway
    keep          how many of the last checkpoints stay; the best stays besides
    prefetch      batches to prepare ahead
    graph         repeat the training step as one CUDA graph; None: on a GPU. A resumed run must be told anew
    tensorboard   write its events as well, in `out`
    report        draw the log and the predictions at the end, in `out`
    json          print JSON, one line an epoch and one for the result, instead of sentences
    """

    data: str = "shapes"
    size: int = 224
    model: str = "googlenet_small"
    aux_logits: bool | None = None
    width: float = 1.0
    validation: float = 0.0
    test_average: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    out: Path | None = None
    weights: Path | None = None
    save_every: int = 200
    keep: int = 2
    prefetch: int = 2
    graph: bool | None = None
    tensorboard: bool = False
    report: bool = True
    quiet: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("save_every", 1), ("keep", 1), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise MinigradError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """All but the recipe and the directory, which a checkpoint has anyway, as plain JSON values."""
        options = {name: getattr(self, name) for name in _STORED}
        return options | {"weights": None if self.weights is None else str(self.weights)}

    @classmethod
    def from_json(cls, options: dict[str, Any], recipe: Recipe) -> Run:
        """The inverse of `to_json`. Raises MinigradError, or what Python raises where there is no such thing."""
        weights = options["weights"] if options["weights"] is None else Path(options["weights"])
        if wrong := [name for name, kinds in _STORED.items() if type(options[name]) not in kinds]:
            raise MinigradError(f"{', '.join(wrong)} of another kind")
        if recipe.name not in RECIPES:
            raise MinigradError(no_such("recipe", recipe.name, RECIPES))
        return cls(**{name: options[name] for name in _STORED}, recipe=recipe, weights=weights)

    @property
    def weights_file(self) -> Path:
        """Where the weights go."""
        return self.weights or (self.out or Path()) / "weights.npz"

    def command(self) -> str:
        """The command that trains the same again."""
        words = ["--data", self.data, "--model", self.model, "--recipe", self.recipe.name]
        if self.aux_logits is not None:
            words.append("--aux" if self.aux_logits else "--no-aux")
        if self.width != Run.width:
            words += ["--width", str(self.width)]
        if self.size != Run.size:
            words += ["--size", str(self.size)]
        if self.validation:
            words += ["--validation", str(self.validation)]
        words += ["--test-average"] * self.test_average
        base = RECIPES[self.recipe.name]
        for option in fields(Recipe):
            value = getattr(self.recipe, option.name)
            if value != getattr(base, option.name):
                flag = option.name.replace("_", "-")
                if isinstance(value, bool):
                    words.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
        return shlex.join(["python", "-m", "inception", "train", *words])


_STORED: dict[str, tuple[type, ...]] = {
    "data": (str,),
    "size": (int,),
    "model": (str,),
    "aux_logits": (bool, type(None)),
    "width": (float, int),
    "validation": (float, int),
    "test_average": (bool,),
    "save_every": (int,),
    "keep": (int,),
    "prefetch": (int,),
    "tensorboard": (bool,),
    "report": (bool,),
    "quiet": (bool,),
    "json": (bool,),
}
# On a GPU so many are evaluated at once, where that is more than a batch: the host is slow to start a small one.
EVALUATED_PIXELS = 2**19
# What may be said anew when a run is resumed: where things are and how fast, nothing that changes the result.
FREE = ("data", "weights", "save_every", "keep", "prefetch", "graph", "tensorboard", "report", "quiet", "json")


def resumed(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Run:
    """The run that a checkpoint continues, in the checkpoint's own directory.

    given    options by name, of Run and of Recipe: those in FREE replace the checkpoint's, others must equal them
    Raises   CheckpointError naming every option that contradicts the checkpoint.
    """
    try:
        own = Run.from_json(checkpoint.state["run"]["options"], Recipe.from_json(checkpoint.state["recipe"]))
    except (KeyError, TypeError, ValueError, MinigradError) as error:
        raise CheckpointError(f"{checkpoint.path}: its options cannot be understood ({error})") from None
    own = replace(own, out=checkpoint.path.parent, quiet=False, json=False)  # who goes on says how to be told
    known = {option.name for option in fields(Run)} - {"recipe"}
    wrong = []
    named = RECIPES.get(given.get("name", own.recipe.name), own.recipe)
    implied = named.to_json() if named.name != own.recipe.name else {}  # one word of the user: said once
    for name, value in given.items():
        if name in implied and name != "name" and value == implied[name]:
            continue
        is_value = getattr(own if name in known else own.recipe, name)
        same = value.resolve() == is_value.resolve() if name == "out" else value == is_value
        if name not in FREE and not same:
            flag = {"aux_logits": "aux", "name": "recipe"}.get(name, name.replace("_", "-"))
            wrong.append(f"--{flag} {value} (it has {is_value})")
    if wrong:
        raise CheckpointError(f"{checkpoint.path} contradicts {', '.join(wrong)}: leave out what shall stay as it is")
    return replace(own, **{name: value for name, value in given.items() if name in FREE})


def run(options: Run, checkpoint: Checkpoint | None = None) -> Evaluation:
    """Train, print a line for each epoch, save the weights, and return the result on the test pictures.

    checkpoint   where to go on, if not from the start; `options` are then those of `resumed`
    Raises       Stopped after SIGINT or SIGTERM: the training is saved, its message says how to go on;
                 NonFiniteError if a loss is NaN or Inf: it says where that begins, and the checkpoints are from before
    """
    recipe, quiet = options.recipe, options.quiet or options.json
    watched = "validation" if options.validation else "test"

    def say(text: str) -> None:
        if not quiet:
            tell(text)

    if checkpoint is None:
        recipe.check_momentum()
    training_set, test_set = open_data(options.data, size=options.size, quiet=quiet)
    watched_set = test_set
    if options.validation:
        training_set, watched_set = split(training_set, options.validation, recipe.seed)
    mean, std = mean_and_std(training_set)
    loader = _training_loader(training_set, options, mean, std)
    on_gpu, (height, width) = backend.backend() == "cupy", training_set.images.shape[1:3]
    at_once = max(recipe.batch_size, EVALUATED_PIXELS // (height * width)) if on_gpu else recipe.batch_size
    tests = Loader(test_set, at_once, mean=mean, std=std)
    held_out = Loader(watched_set, at_once, mean=mean, std=std) if options.validation else tests
    classes = len(training_set.classes)
    built: dict[str, Any] = {"num_classes": classes, "aux_logits": options.aux_logits, "width": options.width}
    model = create_model(options.model, **built, seed=recipe.seed)
    graph = on_gpu if options.graph is None else options.graph
    training = Training(model, loader, recipe, test=held_out, test_average=options.test_average, graph=graph,
                        quiet=quiet)  # fmt: skip
    if quiet and options.graph is None and training.graphed is not None:
        training.graphed.warn = lambda text: None  # nobody has asked for a graph
    averaged = training.average is not None
    about = {
        "model": options.model,
        "options": built | {"aux_logits": any("aux" in name for name, _ in model.named_parameters())},
        "classes": list(training_set.classes),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "size": list(training_set.images.shape[1:3]),
        "data": training_set.name,
        "command": options.command(),
        "weights": f"average over the training, decay {recipe.ema} a step" if averaged else "as trained",
    }
    data = fingerprint(training_set, mean, std)
    if checkpoint is not None:
        theirs = checkpoint.state["run"].get("data")
        known = theirs if isinstance(theirs, dict) else {"mean": None}  # those of older versions say less
        if others := [name for name in data if known.get(name, data[name]) != data[name]]:
            raise CheckpointError(
                f"{checkpoint.path}: trained on other pictures than --data {options.data}: not the same "
                f"{', '.join(others)}"
            )
        restore(checkpoint, training)
    check_suffix(options.weights_file)
    check_place(options.weights_file)
    keeper = Keeper(training, about, {"options": options.to_json(), "data": data}, options.out, watched=watched,
                    save_every=options.save_every, keep=options.keep, tensorboard=options.tensorboard,
                    resumed=checkpoint is not None)  # fmt: skip
    with keeper:
        parameters, chance = sum(parameter.size for parameter in model.parameters()), math.log(classes)
        say(f"{options.model}: {parameters:,} parameters, {classes} classes (guessing has loss {chance:.3f})")
        say(f"{training_set.name}: {len(training_set):,} pictures for training, {len(watched_set):,} for evaluation")
        where = f"{backend.backend()}, " + (f"{backend.precision()}, " if backend.backend() == "cupy" else "")
        say(f"{where}{num_threads()} threads; the same again: {options.command()}")
        if not quiet and loader.feed.where:
            say(loader.feed.where)
        if checkpoint is not None:
            say(f"going on from {checkpoint.path}: step {training.step:,} of {len(loader) * recipe.epochs:,}")

        watchdog = Watchdog(classes)
        for epoch in training.epochs:  # before it was resumed
            watchdog.look(epoch.step, epoch.losses)

        def after_epoch(epoch: Epoch) -> None:
            say(sentence(epoch, watched))
            if not options.quiet:
                alarms = watchdog.look(epoch.step, epoch.losses, waited=loader.waited, seconds=epoch.seconds)
                for alarm in [*alarms, *watchdog.look_at_layers(model, training.some_pictures())]:
                    warn(alarm)
            if options.json:
                tell(as_json(row_of(epoch, watched=watched, average=averaged)))
            keeper.after_epoch()

        with _signals_stop(training):
            try:
                training.run(after_step=keeper.after_step, after_epoch=after_epoch)
                with training.averaged():
                    result = evaluate(model, tests, quiet=quiet, check=training.check) if options.validation else None
            except Stopped as stop:
                keeper.save()
                raise Stopped(stop.signal, keeper.how_to_go_on("stopped")) from None
            except NonFiniteError as error:
                raise type(error)(f"{Exception.__str__(error)}; {keeper.how_to_go_back()}", error.layer_path) from None
            except KeyboardInterrupt:  # the second one: there is no time to save
                raise Stopped(signal.SIGINT, keeper.how_to_go_on("stopped at once")) from None
        last = training.epochs[-1]
        result = result or last.average or last.test
        assert result is not None
        with training.averaged():
            save_weights(options.weights_file, model, about | {"test_accuracy": result.accuracy})
            if options.out is not None and options.report:
                rows = [row_of(epoch, watched=watched, average=averaged) for epoch in training.epochs]
                say(_write_report(options.out, rows, model, tests))
    kind = " (of the averaged weights)" if averaged else ""
    say(f"test accuracy {result.accuracy:.2%}{kind}, loss {result.loss:.4f}; weights in {options.weights_file}")
    if options.json:
        done = {"epochs": recipe.epochs, "step": training.step, "weights": str(options.weights_file)}
        tell(as_json({"test_loss": result.loss, "test_accuracy": result.accuracy, **done}))
    return result


def tell(text: str) -> None:
    """Print a line. If whoever read them has gone, as `| head` does, this and all others are lost, not the training."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fingerprint(training_set: Dataset, mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """What a resumed run must find again, wherever its data have gone meanwhile, as plain JSON values."""
    found = {
        "number": len(training_set),
        "classes": list(training_set.classes),
        "labels": hashlib.sha256(training_set.labels.astype("<i8").tobytes()).hexdigest(),
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    sources = getattr(training_set.images, "sources", None)
    if sources is not None and sources.dtype == object:  # paths
        names = "\n".join(os.path.basename(path) for path in sources)
        found["file names"] = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    return found


def _training_loader(training_set: Dataset, options: Run, mean: np.ndarray, std: np.ndarray) -> Loader:
    """Full batches in random order, changed as the recipe says."""
    recipe = options.recipe
    resized_crop: Any = recipe.resized_crop or None
    augment = Augment(recipe.padding, recipe.flip, recipe.cutout, recipe.jitter, resized_crop)
    return Loader(training_set, recipe.batch_size, mean=mean, std=std, seed=recipe.seed,
                  augment=augment if recipe.augment else None, shuffle=True, drop_last=True,
                  prefetch=options.prefetch)  # fmt: skip


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
def _signals_stop(training: Training) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM lets the training finish its step; the second acts at once."""
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread only
        yield
        return
    second: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def stop(number: int, frame: FrameType | None) -> None:
        training.stopping = number
        signal.signal(number, second[number])
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nfinishing the step and saving; once more stops at once, without saving\n")

    before = {number: signal.signal(number, stop) for number in second}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_report(directory: Path, rows: list[Row], model: Module, tests: Loader) -> str:
    """Draw the log and what the model makes of the test pictures; return what to say of it."""
    dataset = tests.dataset
    model.eval()
    try:
        report.matplotlib_()  # before the predictions are made
        chances = np.concatenate(
            [backend.to_host(ops.softmax(Tensor(logits)).data) for _, logits in predictions(model, tests)]
        )  # (N, K)
        confusion = report.confusion_matrix(dataset.labels, chances.argmax(axis=1), len(dataset.classes))
        mistakes = [(dataset.images[m.row], m) for m in report.worst_mistakes(chances, dataset.labels, 25)]
        files = report.write_report(directory, rows, confusion=confusion, classes=dataset.classes, mistakes=mistakes)
    except (MinigradError, OSError) as error:
        return f"no report: {error}"
    return f"report: {', '.join(map(str, files))}"
