"""One training run from the names of its parts: data, model and recipe in; log, weights and result out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from inception.data import Augment, DataError, Loader, mean_and_std, open_data, split
from inception.models import create_model
from inception.training.loop import Epoch, Evaluation, Recipe, evaluate, train
from inception.weights import check_place, save_weights
from minigrad import backend, num_threads


@dataclass(frozen=True)
class Run:
    """What to train on what, and where the result goes.

    data        what `open_data` reads: "shapes", "cifar10", a directory, …
    validation  share of the training pictures set aside; each epoch is then evaluated on them, and the test
                pictures are seen once, at the end. With 0 each epoch is evaluated on the test pictures.
    weights     the .npz to write
    """

    data: str = "shapes"
    model: str = "googlenet_small"
    aux_logits: bool | None = None
    validation: float = 0.0
    weights: Path = Path("weights.npz")
    recipe: Recipe = field(default_factory=Recipe)
    quiet: bool = False


def run(options: Run) -> Evaluation:
    """Train, print a line for each epoch, save the weights, and return the result on the test pictures."""
    recipe = options.recipe
    training, test = open_data(options.data, quiet=options.quiet)
    watched = test
    if options.validation:
        training, watched = split(training, options.validation, recipe.seed)
    if len(training) < recipe.batch_size:
        raise DataError(
            f"{training.name}: {len(training)} training pictures do not fill a batch of {recipe.batch_size}"
        )
    mean, std = mean_and_std(training)
    loader = Loader(training, recipe.batch_size, mean=mean, std=std, seed=recipe.seed, augment=Augment(),
                    shuffle=True, drop_last=True, prefetch=2)  # fmt: skip
    held_out = Loader(watched, recipe.batch_size, mean=mean, std=std)
    classes = len(training.classes)
    model = create_model(options.model, num_classes=classes, aux_logits=options.aux_logits, seed=recipe.seed)
    check_place(options.weights)
    say = (lambda *_: None) if options.quiet else print
    parameters = sum(parameter.size for parameter in model.parameters())
    say(f"{options.model}: {parameters:,} parameters, {classes} classes (guessing has loss {math.log(classes):.3f})")
    say(f"{training.name}: {len(training):,} pictures for training, {len(watched):,} for evaluation")
    say(f"{backend.backend()}, {num_threads()} threads; {recipe}")

    def after_epoch(epoch: Epoch) -> None:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in epoch.losses.items())
        held = f"test loss {epoch.test.loss:.4f}, accuracy {epoch.test.accuracy:.2%}" if epoch.test else ""
        say(
            f"epoch {epoch.number}: {losses}, accuracy {epoch.accuracy:.2%}; {held}; "
            f"{epoch.seconds:.0f} s, {epoch.pictures_per_second:.0f} img/s"
        )

    epochs = train(model, loader, recipe, test=held_out, quiet=options.quiet, after_epoch=after_epoch)
    if options.validation:
        result = evaluate(model, Loader(test, recipe.batch_size, mean=mean, std=std), quiet=options.quiet)
    else:
        assert epochs[-1].test is not None
        result = epochs[-1].test
    about = {
        "model": options.model,
        "options": {"num_classes": classes, "aux_logits": any("aux" in name for name in epochs[-1].losses)},
        "classes": list(training.classes),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "size": list(training.images.shape[1:3]),
        "data": training.name,
        "test_accuracy": result.accuracy,
    }
    save_weights(options.weights, model, about)
    say(f"test accuracy {result.accuracy:.2%}, loss {result.loss:.4f}; weights in {options.weights}")
    return result
