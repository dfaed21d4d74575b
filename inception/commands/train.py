"""`train`: from the command line to a run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from itertools import count
from pathlib import Path
from textwrap import fill
from typing import Any

from inception.commands.line import EXIT_CODES, FORMAT, add_machine, path
from inception.training import RECIPES, Recipe, Run, open_checkpoint, resumed, run
from inception.training.fields import flag, options_of
from minigrad.backend import backend

_TRAIN = """Train a network, and write its weights, log and checkpoints.

examples:
  python -m inception train                                    built-in shapes, one pass, minutes
  python -m inception train --data cifar10                     downloaded once, or --data DIR, unpacked there
  python -m inception train --data cifar10 --recipe cifar_fast --epochs 16 --cutout 8
  python -m inception train --data DIR --size 96               your pictures: DIR/train/CLASS/… and DIR/test/CLASS/…
  python -m inception train --resume runs/shapes-googlenet_small   go on, bit for bit, where it was stopped

In the run's directory (--out):
  log.jsonl, log.csv   one row an epoch
  checkpoint-….npz     the last of them, after every epoch and every --save-every steps; best.npz the best
  weights.npz          at the end, for evaluate and predict

Ctrl-C, SIGTERM and SIGHUP finish the step, save and stop; SIGUSR1 saves and goes on.
"""
_GROUPS = {"what": "what to train on what", "where": "where it goes"}


def train(resume: Path | None = None, **given: Any) -> int:
    """Train anew, or go on from a checkpoint; what was not given is the recipe's, Run's or the checkpoint's."""
    if resume is not None:
        named = RECIPES[given.pop("recipe")].to_json() if "recipe" in given else {}
        checkpoint = open_checkpoint(resume)
        run(resumed(checkpoint, named | given), checkpoint)
        return 0
    data = given.setdefault("data", Run.data)
    recipe = RECIPES[given.pop("recipe", "shapes" if data == "shapes" else "cifar_small")]
    changes = {option.name: given.pop(option.name) for option in fields(Recipe) if option.name in given}
    options = Run(**given, recipe=replace(recipe, **changes))
    if options.out is None:
        options = replace(options, out=free_directory(f"{Path(data).resolve().stem}-{options.model}"))
    run(options)
    return 0


def free_directory(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, … that does not exist."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(path for path in map(Path("runs").joinpath, names) if not path.exists())


def _smaller(given: Mapping[str, Any]) -> str:
    """What to lower when the memory is not enough."""
    graph = "try --no-graph, " if backend() == "cupy" and given.get("graph") is not False else ""
    if "resume" in given:
        again = f"{graph}go on with --resume when more is free, or train anew with a lower --batch-size"
        return f"nothing saved is lost; {again}"
    smaller = "choose a smaller network, or set `recompute` of its modules in a program"
    return f"{graph}lower --batch-size or --width, {smaller}"


def add_train(commands: Any) -> None:
    """Add the command to the parser of commands: its options are those of `Run` and `Recipe`."""
    epilog = "\n".join([_recipe_table(), "", EXIT_CODES])
    parser = commands.add_parser("train", help="train a network", usage="%(prog)s [options]", description=_TRAIN,
                                 epilog=epilog, **FORMAT)  # fmt: skip
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    groups["where"].add_argument("--resume", type=path, metavar="DIR|FILE",
                                 help="go on from this checkpoint, or the newest of this directory, with its options; "
                                 "those that do not change the result may be given anew")  # fmt: skip
    groups["where"].add_argument("--weights", action=_Renamed, help=argparse.SUPPRESS)
    groups["machine"] = add_machine(parser)
    for option in options_of(Run):
        if group := option.metadata.get("group"):
            default = option.metadata.get("otherwise") or _value(option.default)
            groups[group].add_argument(flag(option), **_argument(option, f"(default: {default})"))
    recipe = parser.add_argument_group(
        "recipe",
        "A named recipe (below), and what shall differ from it. In parentheses: the values of cifar_small.",
    )
    recipe.add_argument("--recipe", choices=list(RECIPES), help="(default: shapes for the shapes, else cifar_small)")
    for option in options_of(Recipe):
        if option.name != "name":
            recipe.add_argument(flag(option), **_argument(option, f"({_value(option.default)})"))
    parser.set_defaults(command=train, smaller=_smaller, on_disk=True)


def _argument(option: Field[Any], default: str) -> dict[str, Any]:
    """What argparse must know of an option."""
    rule = option.metadata
    kind: Any = rule["kind"]
    common = {"dest": option.name, "help": f"{rule['help']} {default}".replace("%", "%%")}
    if kind is bool:
        return common | {"action": argparse.BooleanOptionalAction}
    if rule["choices"]:
        return common | {"choices": rule["choices"]} | ({"metavar": rule["metavar"]} if "metavar" in rule else {})
    common["metavar"] = rule.get("metavar", "N" if kind is int else "X")
    if kind is tuple:
        return common | {"type": float, "nargs": "*", "action": _Tuple}
    types = {Path: path, str: os.path.expanduser}
    return common | {"type": types.get(kind, kind)}


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Renamed(argparse.Action):
    """`--weights` names weights to read everywhere else."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise argparse.ArgumentError(
            None,
            f"train reads no weights: --save {values} names the file to write, --resume a checkpoint to go on from",
        )


def _recipe_table() -> str:
    """Each recipe as the options in which it differs from the first."""
    first, *others = RECIPES.values()
    lines = [f"recipes, and where they differ from the values above, which are those of {first.name}:"]
    for recipe in others:
        values = ((option.name, getattr(recipe, option.name)) for option in fields(Recipe) if option.name != "name")
        changed = [f"{name.replace('_', '-')} {_value(v)}" for name, v in values if v != getattr(first, name)]
        lines.append(fill(f"{recipe.name}: {', '.join(changed)}", 100, initial_indent="  ", subsequent_indent="      ",
                          break_on_hyphens=False))  # fmt: skip
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(f"{number:g}" for number in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
