"""The command line: python -m inception train | evaluate | predict | summary."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

import minigrad
from inception.data import DataError, Loader, find_pictures, normalise, open_data, read_picture
from inception.models import create_model, list_models
from inception.training import RECIPES, Recipe, Run, Stopped, open_checkpoint, resumed, run, tally, to_tensor
from inception.training.log import as_json
from inception.weights import load_model
from minigrad import no_grad, ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError

_EXIT_CODES = """exit codes:
  0    done
  1    an error, told in one sentence on standard error; predict: also if one of the pictures could not be read
  2    the command line cannot be understood
  130  stopped by Ctrl-C (SIGINT), 143 by SIGTERM: training is saved, and the last line says how to go on
"""

_TRAIN = """Train a network, and write its weights, log and checkpoints.

examples:
  python -m inception train                                    built-in shapes, one pass, minutes
  python -m inception train --data cifar10                     downloaded once, or --data DIR, unpacked there
  python -m inception train --data cifar10 --recipe cifar_fast --epochs 16 --lr 0.2
  python -m inception train --data DIR --size 96               your pictures: DIR/train/CLASS/… and DIR/test/CLASS/…
  python -m inception train --resume runs/cifar                go on, bit for bit, where it was stopped

In the run's directory (--out):
  log.jsonl, log.csv   one row an epoch
  checkpoint-….npz     the last of them, after every epoch and every --save-every steps; best.npz the best
  weights.npz          at the end, for evaluate and predict
"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m inception") -> int:
    """Run one command and return its exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # names and bars, where the output is not in UTF-8
    args = vars(_parser(prog).parse_args(argv))
    command = args.pop("command")
    try:
        if name := args.pop("backend", None):
            minigrad.set_backend(name)
        if (threads := args.pop("threads", None)) is not None:
            minigrad.set_num_threads(threads)
        return int(command(**args))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (MinigradError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # CuPy's
            raise
        print(f"error: out of memory ({error}): {_cheaper(command, args)}", file=sys.stderr)
    return 1


def _cheaper(command: Callable[..., int], args: dict[str, Any]) -> str:
    """What to lower when the memory is not enough."""
    if command is _summary:
        return "lower --size"
    if "resume" in args:
        return "nothing saved is lost; go on with --resume when more is free, or train anew with a lower --batch-size"
    return "lower --batch-size, or choose a smaller network"


# ---- train ----


def _train(resume: Path | None = None, **given: Any) -> int:
    if resume is not None:
        named = RECIPES[given.pop("recipe")].to_json() if "recipe" in given else {}
        checkpoint = open_checkpoint(resume)
        run(resumed(checkpoint, named | given), checkpoint)
        return 0
    data = given.setdefault("data", "shapes")
    recipe = RECIPES[given.pop("recipe", "shapes" if data == "shapes" else "cifar_small")]
    changes = {option.name: given.pop(option.name) for option in fields(Recipe) if option.name in given}
    options = Run(**given, recipe=replace(recipe, **changes))
    if options.out is None:
        options = replace(options, out=_free_directory(f"{Path(data).resolve().stem}-{options.model}"))
    run(options)
    return 0


def _free_directory(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, … that holds nothing."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(path for path in map(Path("runs").joinpath, names) if not path.exists())


def _add_train(commands: Any) -> None:
    epilog = "\n".join([_recipe_table(), "", _EXIT_CODES])
    parser = commands.add_parser("train", help="train a network", usage="%(prog)s [options]", description=_TRAIN,
                                 epilog=epilog, **_FORMAT)  # fmt: skip
    what = parser.add_argument_group("what to train on what")
    what.add_argument("--data", metavar="DATA", help=f"{_DATA} (default: {Run.data})")
    what.add_argument("--size", type=int, metavar="S", help=f"of the pictures in folders, pixels (default: {Run.size})")
    what.add_argument("--model", choices=list_models(), metavar="MODEL",
                      help=f"{', '.join(list_models())} (default: {Run.model})")  # fmt: skip
    what.add_argument("--aux", dest="aux_logits", action=argparse.BooleanOptionalAction,
                      help="with auxiliary heads (default: as the model was published)")  # fmt: skip
    what.add_argument("--width", type=float, metavar="X",
                      help=f"factor of all widths, 0.25 for a small network (default: {Run.width:g})")  # fmt: skip
    what.add_argument("--validation", type=float, metavar="SHARE",
                      help="of the training pictures, to evaluate on; the test pictures are then seen once, at the end "
                      f"(default: {Run.validation:g}, evaluate on the test pictures)")  # fmt: skip
    what.add_argument("--test-average", action="store_true",
                      help="evaluate the averaged weights too after every epoch, not only after the last")  # fmt: skip

    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", type=Path, metavar="DIR", help="directory of the run (default: runs/DATA-MODEL)")
    where.add_argument("--weights", type=Path, metavar="FILE", help="file to write (default: weights.npz in --out)")
    where.add_argument("--resume", type=Path, metavar="DIR|FILE",
                       help="go on from this checkpoint, or the newest of this directory, with its options; those that "
                       "do not change the result may be given anew")  # fmt: skip
    where.add_argument("--save-every", type=int, metavar="STEPS", help=f"(default: {Run.save_every})")
    where.add_argument("--keep", type=int, metavar="N", help=f"last checkpoints to keep (default: {Run.keep})")
    where.add_argument("--tensorboard", action="store_true", help="write TensorBoard events as well")
    where.add_argument("--report", action=argparse.BooleanOptionalAction,
                       help="draw curves and predictions at the end, with matplotlib (default: yes)")  # fmt: skip

    _add_machine(parser, prefetch=True)
    recipe = parser.add_argument_group(
        "recipe",
        "A named recipe (below), and what shall differ from it. In parentheses: the values of cifar_small.",
    )
    recipe.add_argument("--recipe", choices=list(RECIPES), help="(default: shapes for the shapes, else cifar_small)")
    for option in fields(Recipe):
        if option.name != "name":
            recipe.add_argument(f"--{option.name.replace('_', '-')}", **_argument(option.default, option.metadata))
    parser.set_defaults(command=_train)


def _argument(default: Any, metadata: Any) -> dict[str, Any]:
    """What argparse must know of an option of a recipe."""
    help = f"{metadata['help']} ({_value(default)})"
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "help": help}
    if isinstance(default, str):
        return {"choices": metadata["choices"], "help": help}
    if isinstance(default, tuple):
        return {"type": float, "nargs": "*", "action": _Tuple, "metavar": "X", "help": help}
    return {"type": type(default), "metavar": "N" if isinstance(default, int) else "X", "help": help}


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


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


# ---- evaluate ----


def _evaluate(weights: Path, data: str, split: str, batch_size: int, quiet: bool, json: bool) -> int:
    model, about = load_model(weights)
    dataset = dict(zip(("train", "test"), open_data(data, size=about["size"][0], quiet=quiet or json), strict=True))[
        split
    ]
    if list(dataset.classes) != about["classes"]:
        raise DataError(
            f"--data {data}: its classes ({_some(dataset.classes)}) are not those that {weights} "
            f"tells apart ({_some(about['classes'])})"
        )
    mean, std = np.array(about["mean"]), np.array(about["std"])
    loss, right, seen = tally(model, Loader(dataset, batch_size, mean=mean, std=std), quiet=quiet or json)
    shares = [float(r / s) if s else float("nan") for r, s in zip(right, seen, strict=True)]
    result = {"loss": loss / len(dataset), "accuracy": int(right.sum()) / len(dataset)}
    if json:
        by_class = dict(zip(dataset.classes, map(_share_or_none, shares), strict=True))
        print(as_json({"weights": str(weights), "data": dataset.name, "pictures": len(dataset), **result,
                       "accuracy_by_class": by_class}))  # fmt: skip
        return 0
    print(f"{dataset.name}, {len(dataset):,} pictures: loss {result['loss']:.4f}, accuracy {result['accuracy']:.2%}")
    width = max(map(len, dataset.classes))
    for name, share, n in zip(dataset.classes, shares, seen, strict=True):
        print(f"  {name:{width}}  {share:7.2%} of {n:,}" if n else f"  {name:{width}}  no pictures")
    return 0


def _share_or_none(share: float) -> float | None:
    return share if share == share else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if len(names) > 3 else "")


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="loss and accuracy of a trained network",
        description="Loss and accuracy of a trained network on a data set, in all and by class.\n\n"
        "example: python -m inception evaluate runs/weights.npz --data DIR",
        epilog=_EXIT_CODES,
        **_FORMAT,
    )
    parser.add_argument(
        "weights", type=Path, metavar="WEIGHTS", help="an .npz that training has written, or a checkpoint"
    )
    parser.add_argument("--data", default="shapes", metavar="DATA", help=f"{_DATA} (default: shapes)")
    parser.add_argument("--split", choices=["test", "train"], default="test", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: 128)")
    _add_machine(parser)
    parser.set_defaults(command=_evaluate, quiet=False, json=False)


# ---- predict ----


def _predict(weights: Path, pictures: list[Path], top: int, quiet: bool, json: bool) -> int:
    if top < 1:
        raise DataError(f"--top must be at least 1, got {top}")
    model, about = load_model(weights)
    mean, std, size = np.array(about["mean"]), np.array(about["std"]), tuple(about["size"])
    unreadable = 0
    for path in find_pictures(pictures):
        try:
            picture = read_picture(path, size)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            if json:
                print(as_json({"picture": str(path), "error": str(error)}), flush=True)
            unreadable += 1
            continue
        with no_grad():
            logits = model(to_tensor(normalise(picture[None], mean, std)))
            chances = to_host(ops.softmax(logits).data)[0].astype(float)
        ranked = [int(k) for k in chances.argsort()[::-1][:top]]
        best = [{"class": about["classes"][k], "probability": float(chances[k])} for k in ranked]
        if json:
            print(as_json({"picture": str(path), "classes": best}), flush=True)
            continue
        print(path)
        for k in ranked:
            print(f"  {chances[k]:6.1%} {'█' * round(20 * chances[k]):20} {about['classes'][k]}")
    return 1 if unreadable else 0


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="what is in these pictures?",
        description="The most likely classes of each picture, by a network that train has written. A picture that\n"
        "cannot be read is named on standard error, and the others are still looked at.\n\n"
        "example: python -m inception predict runs/weights.npz picture.png directory/",
        epilog=_EXIT_CODES,
        **_FORMAT,
    )
    parser.add_argument(
        "weights", type=Path, metavar="WEIGHTS", help="an .npz that training has written, or a checkpoint"
    )
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE|DIR", help="files, or directories of them")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to print (default: 3)")
    _add_machine(parser)
    parser.set_defaults(command=_predict, quiet=False, json=False)


# ---- summary ----


def _summary(
    model: str, size: int | None, classes: int | None, aux: bool | None, depth: int | None, quiet: bool, json: bool
) -> int:
    if size is not None and size < 1:
        raise DataError(f"--size must be at least 1, got {size}")
    network = create_model(model, num_classes=classes, aux_logits=aux)
    size = size or network.form.size.native
    found = minigrad.summary(network, (3, size, size), depth=depth)
    if json:
        rows = [row._asdict() for row in found.rows]
        print(as_json({"model": model, "size": size, **found._asdict(), "rows": rows}))
    else:
        print(found)
    return 0


def _add_summary(commands: Any) -> None:
    parser = commands.add_parser(
        "summary",
        help="layers, shapes, parameters, cost and memory of a network",
        description="Each layer's output and parameters, and for one picture multiply-adds and bytes kept for\n"
        "backward.\n\n"
        "example: python -m inception summary googlenet --depth 1",
        epilog=_EXIT_CODES,
        **_FORMAT,
    )
    parser.add_argument("model", choices=list_models(), metavar="MODEL", help=", ".join(list_models()))
    parser.add_argument("--size", type=int, default=None, metavar="S",
                        help="side of the picture, pixels (default: as published)")  # fmt: skip
    parser.add_argument("--classes", type=int, default=None, metavar="N", help="(default: as published)")
    parser.add_argument("--aux", action=argparse.BooleanOptionalAction, default=None, help="with auxiliary heads")
    parser.add_argument("--depth", type=int, default=None, metavar="N", help="fold layers deeper than this")
    _add_machine(parser)
    parser.set_defaults(command=_summary, quiet=False, json=False)


# ---- all of them ----

_DATA = (
    "shapes (drawn here), cifar10 or cifar100 (downloaded once), a directory with the batches of either, a directory "
    "with train/CLASS/PICTURE and test/CLASS/PICTURE, or a file .npz with x_train, y_train, x_test, y_test"
)

_FORMAT: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "argument_default": argparse.SUPPRESS,  # only what was given is passed on: the rest is the recipe's, or Run's
    "allow_abbrev": False,
}


def _add_machine(parser: argparse.ArgumentParser, prefetch: bool = False) -> None:
    group = parser.add_argument_group("machine and output")
    group.add_argument("--backend", choices=["numpy", "cupy"], help="(default: MINIGRAD_BACKEND, or numpy)")
    group.add_argument("--threads", type=int, metavar="N", help="(default: MINIGRAD_NUM_THREADS, or all cores)")
    if prefetch:
        group.add_argument(
            "--prefetch", type=int, metavar="N", help=f"batches to prepare ahead (default: {Run.prefetch})"
        )
    group.add_argument("--quiet", action="store_true", help="no progress bar; train: nothing but errors")
    group.add_argument("--json", action="store_true", help="print JSON, one object a line, and nothing else")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=_EXIT_CODES, **_FORMAT)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_train, _add_evaluate, _add_predict, _add_summary):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
