"""Train, evaluate, use and export networks of the Inception family."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while the imports run, which take a second: nothing has begun that could be lost
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"stopped\n"), os._exit(130)))

import argparse
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import minigrad
from inception.commands.line import EXIT_CODES, FORMAT, Parser, add_machine, run_command
from inception.commands.train import add_train
from inception.console import say, warn
from inception.data import DataError, Loader, Preprocessing, check_preparation, find_pictures, open_data
from inception.data.pictures import SUFFIXES as PICTURES
from inception.evaluate import tally, to_tensor
from inception.export import export_onnx
from inception.files import FileError, check_place, open_file, parse_json
from inception.models import compare, create_model, googlenet, list_models
from inception.training.log import as_json
from inception.training.options import DATA
from inception.weights import (
    WeightsError,
    are_weights,
    check_classes,
    find_weights,
    is_address,
    is_shipped,
    load_model,
    of_run,
    save_weights,
    shipped,
)
from minigrad import no_grad, ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError, no_such
from minigrad.watch import columns


def main(argv: Sequence[str] | None = None, prog: str = "python -m inception") -> int:
    """Run one command and return its exit code."""
    return run_command(_parser(prog), argv)


def _at_least(option: str, value: int | None, least: int) -> None:
    """Raise MinigradError for a value that is too small; None is an option not given."""
    if value is not None and value < least:
        raise MinigradError(f"{option} must be at least {least}, got {value}")


# ---- evaluate ----


def _evaluate(weights: str, data: str, split: str, model: str | None, batch_size: int, quiet: bool, json: bool) -> int:
    file = _weights(weights, quiet or json)
    network, about = load_model(file, model)
    prepared = Preprocessing.of(about)
    dataset = prepared.dataset(open_data(data, quiet=quiet or json)[("train", "test").index(split)])
    if list(dataset.classes) != about["classes"]:
        raise DataError(
            f"--data {data}: its classes ({_some(dataset.classes)}) are not those that {weights} "
            f"tells apart ({_some(about['classes'])}): name the data that it was trained on"
        )
    mean, std = np.array(prepared.mean), np.array(prepared.std)
    loss, right, seen = tally(network, Loader(dataset, batch_size, mean=mean, std=std), quiet=quiet or json)
    shares = [float(r / s) if s else float("nan") for r, s in zip(right, seen, strict=True)]
    result = {"loss": loss / len(dataset), "accuracy": int(right.sum()) / len(dataset)}
    if json:
        by_class = dict(zip(_distinct(dataset.classes), map(_share_or_none, shares), strict=True))
        say(as_json({"weights": str(file), "data": dataset.name, "pictures": len(dataset), **result,
                     "accuracy_by_class": by_class}))  # fmt: skip
        return 0
    say(f"{dataset.name}, {len(dataset):,} pictures: loss {result['loss']:.4f}, accuracy {result['accuracy']:.2%}")
    width = max(map(len, dataset.classes))
    for name, share, n in zip(dataset.classes, shares, seen, strict=True):
        say(f"  {name:{width}}  {share:7.2%} of {n:,}" if n else f"  {name:{width}}  no pictures")
    return 0


def _weights(place: str, quiet: bool) -> Path:
    """`find_weights`, which also says which weights of a run's directory are taken."""
    file = find_weights(place, quiet=quiet)
    if not quiet and Path(place).is_dir():
        warn(f"{place}: a run, with the weights in {file.name}")
    return file


def _distinct(names: Sequence[str]) -> list[str]:
    """The names as keys: two classes of one name, as ImageNet's two cranes, are "crane" and "crane (2)"."""
    found: list[str] = []
    for name in names:
        tries = (name if number == 1 else f"{name} ({number})" for number in count(1))
        found.append(next(key for key in tries if key not in found))
    return found


def _share_or_none(share: float) -> float | None:
    return share if share == share else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if len(names) > 3 else "")


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "evaluate",
        _evaluate,
        help="loss and accuracy of a trained network",
        description="Loss and accuracy of a trained network on a data set, in all and by class. Pictures are prepared\n"
        "as the weights say, as predict does it.\n\n"
        "example: python -m inception evaluate runs/weights.npz --data DIR",
    )
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a file of weights, whoever wrote it, a run's directory (its finished weights, else its best), the name "
        "of a shipped model, or an address to download from: https://…#sha256=DIGITS",
    )
    parser.add_argument("--data", default="shapes", metavar="DATA", help=f"{DATA} (default: shapes)")
    parser.add_argument("--split", choices=["test", "train"], default="test", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="(default: 128)")
    _add_foreign(parser)


# ---- predict ----


def _predict(weights: str | None, pictures: list[str], model: str | None, top: int, quiet: bool, json: bool) -> int:
    _at_least("--top", top, 1)
    first = pictures[0]
    first_are_weights = is_shipped(first) or of_run(Path(first)) or are_weights(Path(first))
    if weights is None and (first_are_weights or (is_address(first) and not first.lower().endswith(PICTURES))):
        weights, *pictures = pictures
        if not pictures:
            raise DataError(f"{weights} are weights: name pictures after them")
    for place in pictures:
        if is_address(place):
            raise DataError(f"{place}: an address of a picture: download it first")
        if of_run(Path(place)):
            raise DataError(f"{place}: a training run, not pictures: name its weights first, pictures after them")
    file = shipped() if weights is None else _weights(weights, quiet or json)
    network, about = load_model(file, model)
    prepared = Preprocessing.of(about)
    unreadable = 0
    for path in find_pictures([Path(place) for place in pictures]):
        try:
            picture = prepared.read(path)
        except DataError as error:
            warn(f"error: {error}")
            if json:
                say(as_json({"picture": str(path), "error": str(error)}))
            unreadable += 1
            continue
        with no_grad():
            logits = network(to_tensor(picture))
            chances = to_host(ops.softmax(logits).data)[0].astype(float)
        if not np.isfinite(chances).all():
            raise WeightsError(f"{weights or 'the shipped model'} makes NaN of {path}: its weights are damaged")
        ranked = [int(k) for k in chances.argsort()[::-1][:top]]
        best = [{"class": about["classes"][k], "probability": float(chances[k])} for k in ranked]
        if json:
            say(as_json({"picture": str(path), "classes": best}))
            continue
        say(str(path))
        for k in ranked:
            say(f"  {chances[k]:6.1%} {'█' * round(20 * chances[k]):20} {about['classes'][k]}")
    return 1 if unreadable else 0


def _add_predict(commands: Any) -> None:
    parser = _add_command(
        commands,
        "predict",
        _predict,
        help="what is in these pictures?",
        description="The most likely classes of each picture, by a network that train has written. A picture that\n"
        "cannot be read is named on standard error, and the others are still looked at.\n\n"
        "examples:\n"
        "  python -m inception predict picture.png                               by the model that comes with it\n"
        "  python -m inception predict runs/weights.npz picture.png directory/   by one of yours\n"
        "  python -m inception predict googlenet-1378be20.pth picture.png        by torchvision's, as it is\n"
        "  python -m inception predict https://download.pytorch.org/models/googlenet-1378be20.pth picture.png",
        usage="%(prog)s [options] [WEIGHTS] PICTURE|DIR …",
    )
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE|DIR",
        help="files, or directories of them; first maybe weights: a file with any name, a run's directory, "
        "an address, or the name of a shipped model",
    )
    parser.add_argument("--weights", default=None, metavar="FILE|NAME|ADDRESS",
                        help="weights, a run's directory, the name of a shipped model, or an address to download from, "
                        "https://…#sha256=DIGITS (default: the shipped one)")  # fmt: skip
    _add_foreign(parser)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to print (default: 5)")


def _add_foreign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list_models(), default=None, metavar="MODEL",
                        help="the network, if the names in weights of another project do not tell it: its arrays are "
                        "then taken by their order")  # fmt: skip


# ---- export ----


def _export(source: str, to: Path, size: int | None, model: str | None, about: Path | None, fold: bool, quiet: bool,
            json: bool) -> int:  # fmt: skip
    _at_least("--size", size, 1)
    if to.suffix not in (".onnx", ".safetensors", ".pth", ".npz"):
        raise WeightsError(f"--to {to}: the name must end in .onnx, .safetensors, .pth or .npz")
    fresh = source in list_models() and not Path(source).exists() and not is_shipped(source)
    if fresh:
        network = create_model(source)
        classes = [str(k) for k in range(network.fc1.weight.shape[0])]
        side, half = network.form.size.native, [0.5] * 3
        options = {"num_classes": len(classes), "aux_logits": network.aux_logits}
        known: dict[str, Any] = {"model": source, "options": options, "classes": classes, "size": [side, side],
                                 "mean": half, "std": half, "weights": "fresh, not trained"}  # fmt: skip
    elif not (Path(source).suffix or Path(source).exists() or is_address(source) or is_shipped(source)):
        raise WeightsError(no_such("file and no model", source, list_models()))
    else:
        network, known = load_model(_weights(source, quiet or json), model)
    known |= _description(about, len(known["classes"])) if about else {}
    check_place(to)
    if to.suffix == ".onnx":
        if known["options"].get("in_channels", 3) == 3:
            check_preparation(known)
        height, width = (size, size) if size else known.get("size", [network.form.size.native] * 2)
        export_onnx(to, network, (known["options"].get("in_channels", 3), height, width), known, fold=fold)
    else:
        Preprocessing.of(known)  # raises if predict could not use it
        save_weights(to, network, {key: value for key, value in known.items() if key != "format"})
    parameters = sum(parameter.size for parameter in network.parameters())
    if json:
        say(as_json({"source": source, "to": str(to), "model": known["model"], "parameters": parameters,
                     "read": known.get("source", ""), "fresh": fresh}))  # fmt: skip
    elif not quiet:
        if "source" in known:
            say(f"read {known['source']}")
        weights = ", fresh weights, not trained" if fresh else ""
        say(f"{to}: {known['model']}, {parameters:,} parameters, {to.stat().st_size:,} bytes{weights}")
    return 0


def _description(path: Path, classes: int) -> dict[str, Any]:
    """What a file of JSON says of weights that do not say it themselves."""
    try:
        with open_file(path) as file:
            given = parse_json(file.read())
    except FileError as error:
        raise WeightsError(f"--about {error}") from None
    except ValueError as error:
        raise WeightsError(f"--about {path}: cannot be read as JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(given, dict):
        raise WeightsError(f'--about {path}: it must be a JSON object, {{"classes": […], "size": […], …}}')
    if wrong := sorted({"model", "options", "format"} & given.keys()):
        raise WeightsError(f"--about {path}: leave out {', '.join(wrong)}, which the weights say themselves")
    try:
        check_classes(given.get("classes", [""] * classes), classes)
    except WeightsError as error:
        raise WeightsError(f"--about {path}: {error}") from None
    return given


def _add_export(commands: Any) -> None:
    parser = _add_command(
        commands,
        "export",
        _export,
        help="write a network for other programs",
        description="Write a network and what is known of it as ONNX, safetensors, PyTorch's .pth or our .npz.\n"
        "Weights of torchvision, timm, facenet-pytorch, pytorch-cifar and the UvA tutorial are read as they are, and\n"
        "written with their names (.pth, .safetensors); nothing in a file is executed.\n\n"
        "examples:\n"
        "  python -m inception export runs/weights.npz --to model.onnx\n"
        "  python -m inception export googlenet-1378be20.pth --to googlenet.safetensors --about imagenet.json",
    )
    parser.add_argument(
        "source",
        metavar="WEIGHTS|MODEL",
        help="a file, its address (https://…#sha256=DIGITS), the name of a shipped model, or of another network, whose "
        "weights are then fresh",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help=".onnx, .safetensors, .pth or .npz")
    parser.add_argument("--size", type=int, default=None, metavar="S",
                        help="ONNX: side of the pictures, pixels (default: that of the weights)")  # fmt: skip
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True,
                        help="ONNX: batch norm within the filters (default: yes)")  # fmt: skip
    _add_foreign(parser)
    parser.add_argument("--about", type=Path, default=None, metavar="FILE",
                        help="JSON with what the weights do not say: classes, size, mean, std, resize, interpolation, "
                        "channels")  # fmt: skip


# ---- summary ----


def _summary(model: str, size: int | None, classes: int | None, aux: bool | None, depth: int | None, table_1: bool,
             quiet: bool, json: bool) -> int:  # fmt: skip
    _at_least("--size", size, 1)
    _at_least("--depth", depth, 0)
    network = create_model(model, num_classes=classes, aux_logits=aux)
    if table_1 and model in ("googlenet", "googlenet_paper") and size is None and not classes and not depth:
        return _table_1(json)
    size, depth = size or network.form.size.native, 1 if table_1 else depth
    found = minigrad.summary(network, (3, size, size), depth=depth)
    if json:
        rows = [row._asdict() for row in found.rows]
        print(as_json({"model": model, "size": size, **found._asdict(), "rows": rows}))
    else:
        heads = "; its auxiliary heads are among the rows" if network.aux_logits else ""
        print(f"{model}: {network.form.about}\nfor one picture of {size}×{size} in training{heads}\n\n{found}")
    return 0


def _table_1(json: bool) -> int:
    """Table 1 of the paper beside what its channels come to."""
    rows = googlenet.table_1_beside_ours()
    if json:
        for row in rows:
            agree = {"parameters_agree": row.parameters_agree, "operations_agree": row.operations_agree}
            print(as_json({**row._asdict(), **agree}))
        return 0
    lines: list[tuple[str, ...]] = [("row", "", "stated params", "weights here", "stated ops", "multiply-adds here")]
    for row in rows:
        marks = "" if row.parameters_agree and row.operations_agree else "≠"
        lines.append((row.name, marks, f"{row.stated_k:g}K", f"{row.weights / 1024:.1f}K", f"{row.stated_m:g}M",
                      f"{row.multiply_adds / 1e6:.1f}M"))  # fmt: skip
    print("Table 1 of arXiv:1409.4842 beside googlenet_paper; K is 1024 weights without biases, M a million")
    print(columns(lines, left=2))
    for row in rows:
        if row.remark:
            print(f"{row.name}: {row.remark}")
    return 0


def _compare(models: list[str], quiet: bool, json: bool) -> int:
    found = compare(*models)
    if json:
        for line in found:
            print(as_json(line._asdict()))
        return 0
    lines: list[tuple[str, ...]] = [("model", "size", "parameters", "heads add", "multiply-adds", "bytes kept")]
    for line in found:
        lines.append((line.name, str(line.size), *(f"{n:,}" for n in line[3:])))
    print(columns(lines, left=1), end="\n\n")
    width = max(len(line.name) for line in found)
    for line in found:
        print(f"{line.name:{width}}  {line.about}")
    return 0


def _add_compare(commands: Any) -> None:
    parser = _add_command(
        commands,
        "compare",
        _compare,
        help="what the networks cost, side by side",
        description="Size of the pictures, parameters, and for one picture multiply-adds and bytes kept for backward,\n"
        "each network as published, and what each is. All but the column 'heads add' (parameters) is without\n"
        "auxiliary heads, which summary counts if the network was published with them.\n\n"
        "example: python -m inception compare googlenet inception_v3 inception_v4",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="(default: all of them)")
    parser.set_defaults(models=[])


def _add_summary(commands: Any) -> None:
    parser = _add_command(
        commands,
        "summary",
        _summary,
        help="layers, shapes, parameters, cost and memory of a network",
        description="Each layer's output and parameters, and for one picture multiply-adds and bytes kept for\n"
        "backward. Branches that read the same run as one op: what it keeps stands in the first one's row.\n\n"
        "example: python -m inception summary googlenet --depth 1",
    )
    parser.add_argument("model", choices=list_models(), metavar="MODEL", help=", ".join(list_models()))
    parser.add_argument("--size", type=int, default=None, metavar="S",
                        help="side of the picture, pixels (default: as published)")  # fmt: skip
    parser.add_argument("--classes", type=int, default=None, metavar="N", help="(default: as published)")
    parser.add_argument("--aux", action=argparse.BooleanOptionalAction, default=None,
                        help="with auxiliary heads (default: as published)")  # fmt: skip
    parser.add_argument("--depth", type=int, default=None, metavar="N", help="fold layers deeper than this")
    parser.add_argument("--table-1", action="store_true", default=False,
                        help="the rows of the paper's table; GoogLeNet: beside its numbers")  # fmt: skip


# ---- all of them ----


def _add_command(commands: Any, name: str, run: Callable[..., int], **texts: str) -> argparse.ArgumentParser:
    """A command whose arguments are handed to `run` by name."""
    parser: argparse.ArgumentParser = commands.add_parser(name, epilog=EXIT_CODES, **texts, **FORMAT)
    add_machine(parser)
    parser.set_defaults(command=run, quiet=False, json=False)
    if run in (_summary, _export):
        parser.set_defaults(smaller=lambda given: "lower --size")
    return parser


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__, epilog=EXIT_CODES, **FORMAT)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_train, _add_evaluate, _add_predict, _add_export, _add_summary, _add_compare):
        add(commands)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the interpreter ends
    sys.exit(code)
