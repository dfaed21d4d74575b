"""What the examples look at: a trained model, and pictures it was not trained on.

Two models come with the package: googlenet_small_shapes, which the examples take unless told otherwise, and
googlenet_small, trained on CIFAR-10 (--weights googlenet_small --data DIR).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception.data import Loader, Preprocessing, load_shapes, normalise, open_data
from inception.report import matplotlib_
from inception.training import evaluate, to_tensor
from inception.weights import find_weights, load_model
from minigrad import Tensor
from minigrad.errors import MinigradError

JUDGED = 500  # pictures, at most, for the accuracy


class Subject(NamedTuple):
    """A model in evaluation mode, and pictures of the classes that it tells apart."""

    model: Any  # an Inception
    about: dict[str, Any]  # what the file says of it
    dataset: Any  # a Dataset; None for an example that needs none
    mean: np.ndarray  # (3,), of pixels in [0, 1]
    std: np.ndarray

    def batch(self, rows: np.ndarray, *, requires_grad: bool = False) -> Tensor:
        """The pictures `rows` as the network reads them, (N, 3, H, W)."""
        return self.tensor(self.dataset.images[rows], requires_grad=requires_grad)

    def tensor(self, images: np.ndarray, *, requires_grad: bool = False) -> Tensor:
        """Any pictures (N, H, W, 3) uint8, likewise."""
        return Tensor(to_tensor(normalise(images, self.mean, self.std)).data, requires_grad)

    def picture(self, x: np.ndarray) -> np.ndarray:
        """A normalised picture (3, H, W) as one to look at, (H, W, 3) in [0, 1]: the way back from `batch`."""
        return np.clip(x.transpose(1, 2, 0) * self.std + self.mean, 0, 1)


def parser(description: str | None, out: str, data: str = "what to look at") -> argparse.ArgumentParser:
    """The options that these examples have. `description` is the script's docstring, `data` what --data is for."""
    words = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--weights", default="googlenet_small_shapes",
                       help="a trained model: a file, or the name of one that is shipped (%(default)s)")  # fmt: skip
    words.add_argument("--data", default="shapes", help=f"{data}: see `python -m inception train --help`")
    words.add_argument("--out", type=Path, default=Path("runs") / out, help="folder for the drawings (%(default)s)")
    return words


def subject(options: argparse.Namespace) -> Subject:
    """The model and the pictures that the options name, for an example that draws; says how good the model is."""
    matplotlib_()  # missed now rather than when all is computed
    model, about = load_model(find_weights(options.weights))
    for parameter in model.parameters():
        parameter.requires_grad = False  # the examples change pictures, never weights
    prepared = Preprocessing.of(about)
    mean, std = np.array(prepared.mean), np.array(prepared.std)
    if options.data is None:
        print(f"{options.weights}: {about['model']}; test accuracy, as the file says: {about.get('test_accuracy')}")
        return Subject(model, about, None, mean, std)
    pictures = load_shapes(0, JUDGED)[1] if options.data == "shapes" else open_data(options.data)[1]
    pictures = prepared.dataset(pictures)
    check_classes(options, about, pictures)
    rows = np.linspace(0, len(pictures) - 1, min(JUDGED, len(pictures))).astype(int)  # of all classes, if sorted by it
    judged = dataclasses.replace(pictures, images=pictures.images[rows], labels=pictures.labels[rows])
    accuracy = evaluate(model, Loader(judged, 100, mean=mean, std=std), quiet=True).accuracy
    print(f"{options.weights}: {about['model']}, {accuracy:.1%} of {len(judged)} pictures of {pictures.name} recognised"
          + near_chance(accuracy, len(about["classes"]), len(judged)))  # fmt: skip
    return Subject(model, about, pictures, mean, std)


def check_classes(options: argparse.Namespace, about: dict[str, Any], pictures: Any) -> None:
    """MinigradError where --data has other classes than --weights tell apart."""
    if list(pictures.classes) != about["classes"]:
        theirs, ours = (", ".join(names[:3]) for names in (about["classes"], pictures.classes))
        raise MinigradError(f"{options.weights} tells {theirs}, … apart, and --data {options.data} has {ours}, …: "
                            "give --data with pictures of its classes")  # fmt: skip


def near_chance(accuracy: float, classes: int, pictures: int) -> str:
    """A warning if guessing would do about as well: within three standard deviations of so many guesses."""
    chance = 1 / classes
    if accuracy > chance + 3 * (chance * (1 - chance) / pictures) ** 0.5:
        return ""
    return f" - NEAR CHANCE ({chance:.0%}): it has learnt next to nothing, so what follows shows nothing"


def told(main: Callable[[], None]) -> int:
    """Run an example: 0, or 1 after one sentence on what was wrong."""
    try:
        main()
    except (MinigradError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
