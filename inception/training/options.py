"""What a run is told: every option of `train` but the recipe's, declared once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from inception.models import list_models
from inception.training.checkpoint import Checkpoint, CheckpointError
from inception.training.fields import check, flag, option, options_of, words
from inception.training.recipes import RECIPES, Recipe
from minigrad.errors import MinigradError, no_such

DATA = (
    "shapes (drawn here), cifar10 or cifar100 (downloaded once), a directory with the batches of either, a directory "
    "with train/CLASS/PICTURE and test/CLASS/PICTURE, or a file .npz with x_train, y_train, x_test, y_test"
)


@dataclass(frozen=True)
class Run:
    """What to train on what, and where the result goes. Each field says in its `help` what it means. Their metadata:

    group     of the options that --help lists together; without one the command line asks in its own way
    result    it changes the result: the command that trains the same again has it, and a resumed run must keep it
    stored    a checkpoint keeps it. Where the result goes is never stored: a file must not choose what is overwritten

    Raises MinigradError naming the option that is of another kind or out of range.
    """

    data: str = option("shapes", DATA, group="what", metavar="DATA", stored=True)
    size: int = option(224, "of the pictures in folders, pixels on a side", least=1, most=4096, group="what",
                       metavar="S", result=True, stored=True)  # fmt: skip
    model: str = option("googlenet_small", ", ".join(list_models()), choices=tuple(list_models()), group="what",
                        metavar="MODEL", result=True, stored=True)  # fmt: skip
    aux_logits: bool | None = option(None, "with auxiliary heads", kind=bool, flag="aux", group="what",
                                     otherwise="as the model was published", result=True, stored=True)  # fmt: skip
    width: float = option(1.0, "factor of all widths, 0.25 for a small network", most=16, group="what", metavar="X",
                          result=True, stored=True)  # fmt: skip
    validation: float = option(
        0.0,
        "share of the training pictures to set aside and evaluate on; the test pictures are then seen once, at the end",
        otherwise="0, evaluate on the test pictures",
        most=1, group="what", metavar="SHARE", result=True, stored=True,
    )  # fmt: skip
    test_average: bool = option(False, "evaluate the averaged weights too after every epoch, not only after the last",
                                group="what", result=True, stored=True)  # fmt: skip
    recipe: Recipe = field(default_factory=Recipe)
    out: Path | None = option(None, "directory of the run's log and checkpoints", kind=Path, group="where",  # noqa: RUF009
                              metavar="DIR", otherwise="runs/DATA-MODEL")  # fmt: skip
    save: Path | None = option(None, "file for the finished weights, which must not exist yet", kind=Path,  # noqa: RUF009
                               group="where", metavar="FILE", otherwise="weights.npz in --out")  # fmt: skip
    save_every: int = option(200, "steps between two checkpoints, besides those after every epoch", least=1,
                             group="where", metavar="STEPS", stored=True)  # fmt: skip
    keep: int = option(2, "last checkpoints to keep, besides the best", least=1, group="where", metavar="N",
                       stored=True)  # fmt: skip
    tensorboard: bool = option(False, "write TensorBoard events as well", group="where", stored=True)
    report: bool = option(True, "draw curves and predictions at the end, with matplotlib", group="where", stored=True)
    prefetch: int = option(2, "batches to prepare ahead", most=1000, group="machine", metavar="N", stored=True)
    graph: bool | None = option(None, "repeat the training step as one CUDA graph, for the same result in less of the "
                                "host's time and more of the GPU's memory", kind=bool, group="machine",
                                otherwise="on a GPU")  # fmt: skip
    quiet: bool = option(False, "no progress bar, and nothing but errors")
    json: bool = option(False, "print JSON, one line an epoch and one for the result, instead of sentences")

    def __post_init__(self) -> None:
        check(self)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint stores, as plain JSON values."""
        return {option.name: getattr(self, option.name) for option in _STORED}

    @classmethod
    def from_json(cls, options: Mapping[str, Any], recipe: Recipe) -> Run:
        """The inverse of `to_json`. Raises MinigradError, or what Python raises where there is no such thing."""
        if recipe.name not in RECIPES:
            raise MinigradError(no_such("recipe", recipe.name, RECIPES))
        return cls(**{option.name: options[option.name] for option in _STORED}, recipe=recipe)

    @property
    def weights_file(self) -> Path:
        """Where the weights go."""
        return self.save or (self.out or Path()) / "weights.npz"

    def command(self) -> str:
        """The command that trains the same again."""
        given = ["--data", self.data, "--model", self.model, "--recipe", self.recipe.name]
        for record, base in ((self, Run()), (self.recipe, RECIPES[self.recipe.name])):
            for own in options_of(record):
                value = getattr(record, own.name)
                matters = record is self.recipe or (own.metadata.get("result") and own.name != "model")
                if matters and value != getattr(base, own.name):
                    given += words(own, value)
        return shlex.join(["python", "-m", "inception", "train", *given])


_STORED = [option for option in options_of(Run) if option.metadata.get("stored")]


def resumed(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Run:
    """The run that a checkpoint continues, in the checkpoint's own directory.

    given    options by name, of Run and of Recipe: those that do not change the result replace the checkpoint's, others
             must equal them
    Raises   CheckpointError naming every option that contradicts the checkpoint.
    """
    try:
        own = Run.from_json(checkpoint.state["run"]["options"], Recipe.from_json(checkpoint.state["recipe"]))
    except (AttributeError, KeyError, TypeError, ValueError, MinigradError) as error:
        raise CheckpointError(f"{checkpoint.path}: its options cannot be understood ({error})") from None
    own = replace(own, out=checkpoint.path.parent)
    own_options = {option.name: option for option in options_of(Run)}
    named = RECIPES.get(given.get("name", own.recipe.name), own.recipe)
    implied = named.to_json() if named.name != own.recipe.name else {}  # one word of the user: said once
    wrong, anew = [], {}
    for name, value in given.items():
        option = own_options.get(name)
        if option is not None and name != "out" and not option.metadata.get("result"):
            anew[name] = value
        elif option is None and name != "name" and name in implied and value == implied[name]:
            continue
        else:
            has = getattr(own if option is not None else own.recipe, name)
            if value != has and not (name == "out" and value.resolve() == has.resolve()):
                spelt = "--recipe" if name == "name" else flag(option or _RECIPE[name])
                wrong.append(f"{spelt} {value} (it has {has})")
    if wrong:
        raise CheckpointError(f"{checkpoint.path} contradicts {', '.join(wrong)}: leave out what shall stay as it is")
    return replace(own, **anew)


_RECIPE = {option.name: option for option in fields(Recipe)}
