"""`compare` on the CPU: minigrad beside its peers, another checkout or other kernels, one call of each in turn."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.processes import InTurn
from benchmarks.tables import Found, medians
from benchmarks.vocabulary import CONTENDERS, MEASURES, PEERS, Failed, Job, Record, Workload
from inception.export import export_onnx
from inception.models import create_model
from minigrad.errors import MinigradError

ROUNDS = 15
NEEDS = {"torch": ("torch",), "onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def installed() -> list[str]:
    """minigrad, and the peers that can be imported here. One line is printed for each package that is absent."""
    absent = {kind: [p for p in packages if not importlib.util.find_spec(p)] for kind, packages in NEEDS.items()}
    for packages in dict.fromkeys(tuple(packages) for packages in absent.values() if packages):
        print(f"left out, since {' and '.join(packages)} cannot be imported: pip install {' '.join(packages)}")
    return ["ours", *(who for who in PEERS if not absent[CONTENDERS[who].kind])]


def compare(works: list[tuple[str, Workload]], whos: list[str], args: argparse.Namespace) -> Iterator[list[Record]]:
    """For every workload and number of threads: one row for each measure and contender, see `medians`.

    A contender that fails is left out with one line; where minigrad fails, Failed is raised.
    """
    whos = list(whos)
    for name, work in works:
        with tempfile.TemporaryDirectory() as folder:
            exported = export(work, whos, Path(folder))
            for n in args.threads:
                rows = taking_turns(name, work, n, whos, exported, args)
                yield [row | {"threads": n} for row in rows]


def export(work: Workload, whos: list[str], folder: Path) -> str:
    """Write the network as ONNX if an engine wants it; return the file's name. If it cannot be written, the engines
    are removed from `whos`."""
    engines = [who for who in whos if CONTENDERS[who].kind in ("onnxruntime", "openvino")]
    path = folder / "network.onnx"
    if engines:
        model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
        try:
            export_onnx(path, model, (3, work.size, work.size), {})
        except MinigradError as error:
            print(f"left out: {', '.join(CONTENDERS[who].title for who in engines)}: {error}")
            whos[:] = [who for who in whos if who not in engines]
    return str(path)


def taking_turns(
    name: str, work: Workload, n: int, whos: list[str], exported: str, args: argparse.Namespace
) -> list[Record]:
    """A round is one call of each contender, in an order that is reversed from round to round. Two rounds before
    are not counted."""
    found: Found = {}
    children: dict[str, InTurn] = {}

    def ask(who: str, measure: str) -> Record | None:
        try:
            return children[who].ask(measure)
        except Failed as error:
            if who == "ours":
                raise
            print(f"left out: {error}")
            children.pop(who).end()
            whos.remove(who)
            return None

    try:
        for who in whos:
            checkout = str(args.against) if who == "ours_before" else ""
            job = Job(who, [work], [n], [], 1, not args.default_malloc, None, args.python, checkout, exported)
            children[who] = InTurn(job)
        first = first_steps(children, ask)
        for measure in args.measures or MEASURES:
            for number in range(-1 if args.quick else -2, args.rounds or (1 if args.quick else ROUNDS)):
                able = [who for who in children if measure in CONTENDERS[who].measures]
                for who in able if number % 2 == 0 else reversed(able):
                    record = ask(who, measure)
                    if record and number >= 0:
                        found.setdefault((measure, who), []).append(record)
    finally:
        for child in children.values():
            child.end()
    rows = medians(name, work, found)
    return [row | {"first_step": first[row["who"]]} if row["who"] in first else row for row in rows]


def first_steps(children: dict[str, InTurn], ask: Callable[[str, str], Record | None]) -> dict[str, Record]:
    """How far the first training step of each other minigrad is from that of "ours"."""
    others = [who for who in children if CONTENDERS[who].ours and who != "ours"]
    with tempfile.TemporaryDirectory() as folder:
        files = {who: str(Path(folder) / f"{who}.npz") for who in ["ours", *others]} if others else {}
        done = [who for who, file in files.items() if ask(who, f"first_step {file}")]
        return {who: difference(files["ours"], files[who]) for who in done if who != "ours"}


def difference(file: str, other: str) -> Record:
    """Of the loss, the gradients and the parameters after a step: the largest difference over the largest value of the
    same array; 0 if all bits are equal."""
    found: Record = {}
    with np.load(file) as a, np.load(other) as b:
        for name in a.files:
            x, y = a[name], b[name]
            far = 0.0
            if x.tobytes() != y.tobytes():
                far = max(float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-30)), 1e-30)  # -0.0 is not 0.0
            kind = name.partition(" ")[0]
            found[kind] = max(found.get(kind, 0.0), far)
    return found
