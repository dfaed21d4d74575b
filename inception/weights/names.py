"""Arrays under the names of other projects: recognised, put into our networks, and written so that theirs read them.

A project is recognised by all its names and shapes, not by a sign: see projects.py. Weights of any other project are
taken by order and shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from inception.models import Inception, create_model
from inception.weights.projects import PROJECTS, Project
from minigrad import nn
from minigrad.errors import MinigradError

State = dict[str, np.ndarray]

_WRAPPERS = ("module.", "model.", "_orig_mod.")  # DataParallel and averages; Lightning and others; torch.compile
_COUNTERS = ("num_batches_tracked", "n_averaged")  # of batch norm and of averages: no part of a network


class NamesError(MinigradError, ValueError):
    """Foreign weights do not fit the network."""


def plain(state: Mapping[str, np.ndarray]) -> State:
    """Without the prefixes that wrappers put before all names, in whatever order, and without counters."""
    names = [name for name in state if name.rpartition(".")[2] not in _COUNTERS]
    start = 0
    while prefix := next((p for p in _WRAPPERS if names and all(n.startswith(p, start) for n in names)), ""):
        start += len(prefix)
    return {name[start:]: state[name] for name in names}


# ---- by name ----


def their_names(model: Inception, project: Project) -> dict[str, str]:
    """Our name -> theirs, for every array of the model, whose rows are all theirs."""
    names: dict[str, str] = {}
    for row, module in model.children():
        units = list(_units(row, module))
        if not units:
            continue
        prefix, _, inner = project.rows[row].partition(": ")
        theirs = [f"{prefix}.{name}".lstrip(".") for name in inner.split()] if inner else [prefix]
        for unit, name in zip(units, theirs, strict=True):
            names |= _of_unit(unit, name)
    return names


def _units(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of each convolution unit, or single layer with weights, in the order of definition."""
    if isinstance(module, (nn.ConvNormReLU, nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
        return [(path, module)]
    return [unit for name, child in module.children() for unit in _units(f"{path}.{name}", child)]


def _of_unit(unit: tuple[str, nn.Module], theirs: str) -> dict[str, str]:
    path, module = unit
    layers = [(path, module, theirs)]
    if isinstance(module, nn.ConvNormReLU):
        first, slash, second = theirs.partition("/")
        conv = first if slash else f"{theirs}.conv"
        norm = f"{first.rpartition('.')[0]}.{second}" if slash else f"{theirs}.bn"
        layers = [(f"{path}.conv", module.conv, conv), (f"{path}.batchnorm", module.batchnorm, norm)]
    return {
        f"{ours}.{name}": _joined(other, _torch_name(name))
        for ours, layer, other in layers
        for name, value in vars(layer).items()
        if hasattr(value, "data") and not isinstance(value, nn.Module)
    }


def _joined(path: str, word: str) -> str:
    return f"{path}.{word}" if path else word


def _split(name: str) -> tuple[str, str]:
    """The path of a layer, and PyTorch's word for its array."""
    path, _, word = name.rpartition(".")
    return path, _torch_name(word)


def _torch_name(name: str) -> str:
    """PyTorch's word for an array of a layer."""
    return {"gamma": "weight", "beta": "bias"}.get(name, name)


def outward(model: nn.Module) -> dict[str, str]:
    """Our name -> the one in a PyTorch file: of the project that publishes this network, or ours in PyTorch's words."""
    if isinstance(model, Inception):
        for project in PROJECTS:
            if project.model == model.form.name and _rows(model) <= set(project.rows):
                return their_names(model, project)
    return _in_torch_words(model)


def _in_torch_words(model: nn.Module) -> dict[str, str]:
    return {name: _joined(*_split(name)) for name in model.state_shapes()}


def _rows(model: Inception) -> set[str]:
    return {row for row, module in model.children() if _units(row, module)}


def inward(model: nn.Module, state: Mapping[str, np.ndarray]) -> State:
    """The arrays of a file that we have written, under our names.

    Earlier versions had no map of some projects, and wrote the UvA names of batch norms wrong: "input_net.11" for
    "input_net.1". Such files are read too.
    """
    own = {name: name for name in model.state_shapes()}
    theirs = outward(model)
    wrong = {name: re.sub(r"\.(\d)\.(?=[^.]+$)", r".\1\1.", other) if ".batchnorm." in name else other
             for name, other in theirs.items()}  # fmt: skip
    forms = (own, theirs, _in_torch_words(model), wrong)
    best = max(forms, key=lambda form: sum(other in state for other in form.values()))
    back = {other: ours for ours, other in best.items()}
    return {back.get(name, name): array for name, array in state.items()}


# ---- into a network ----


def adopt(state: Mapping[str, np.ndarray], name: str | None) -> tuple[Inception, dict[str, Any]]:
    """The network with foreign weights, and its description: model, options, preprocessing, "source" (a report).

    name   of the network, where the names of the arrays do not tell it
    Raises NamesError that says which array does not fit.
    """
    state = plain(state)
    fits = [_Fit.of(state, project) for project in PROJECTS]
    if found := next((fit for fit in fits if not fit.misfits and name in (None, fit.project.model)), None):
        return found.take(state)
    if name is not None:
        return _by_order(state, name)
    nearest = max(fits, key=lambda fit: fit.share)
    if nearest.share < 0.5:
        raise NamesError("its arrays have names of no project known here: name the network (--model), to take them "
                         "by their order")  # fmt: skip
    raise NamesError(f"nearly {nearest.project.title}, but {_list(nearest.misfits)}: name the network (--model), to "
                     "take its arrays by their order")  # fmt: skip


class _Fit(NamedTuple):
    """How well arrays fit a project's network."""

    project: Project
    model: Inception  # an outline
    options: dict[str, Any]
    names: dict[str, str]  # our name -> theirs
    swapped: str  # for the report
    misfits: list[str]  # what is lacking, or of another shape
    share: float  # of the names that are there

    @classmethod
    def of(cls, state: State, project: Project) -> _Fit:
        rows = project.rows
        heads = [rows[row].partition(":")[0] for row in rows if row.startswith("aux")]
        classifier = state.get(f"{rows['fc1']}.weight", np.empty(0))
        options = {
            "num_classes": len(classifier) if classifier.ndim == 2 and len(classifier) else None,
            "aux_logits": bool(heads) and all(any(name.startswith(f"{head}.") for name in state) for head in heads),
        }
        model = _outline(project.model, **options)
        names, swapped = their_names(model, project), ""
        wanted = model.state_shapes()
        if options["aux_logits"] and len(heads) == 2:
            # The first head looks at 512 channels, the second at 528.
            first, second = heads
            if state.get(f"{first}.conv.conv.weight", np.empty(0)).shape == wanted["aux2.conv.conv.weight"]:
                other = {first: second, second: first}
                names = {n: re.sub(r"^aux\d", lambda head: other[head[0]], theirs) for n, theirs in names.items()}
                swapped = "; its heads had exchanged their names"
        lacking = [theirs for theirs in names.values() if theirs not in state]
        other_shape = [
            f"{theirs} has {_times(state[theirs].shape)} instead of {_times(wanted[ours])}"
            for ours, theirs in names.items()
            if theirs in state and state[theirs].shape != wanted[ours]
        ]
        misfits = ([f"it lacks {_list(lacking)}"] if lacking else []) + other_shape
        return cls(project, model, options, names, swapped, misfits, 1 - len(lacking) / len(names))

    def take(self, state: State) -> tuple[Inception, dict[str, Any]]:
        """The network with the arrays, and its description."""
        self.model.load_state_dict({ours: state[theirs] for ours, theirs in self.names.items()})
        rest = sorted(set(state) - set(self.names.values()))
        left = f"; left out: {_list(rest)}" if rest else ""
        report = f"{self.project.title}: {len(self.names)} arrays by name{self.swapped}{left}"
        about = {"model": self.project.model, "options": self.options, **self.project.about, "source": report}
        return self.model, about


def _outline(name: str, **options: Any) -> Inception:
    with nn.outline():
        return create_model(name, **options)


def _by_order(state: State, name: str) -> tuple[Inception, dict[str, Any]]:
    theirs = _layers({name: array.shape for name, array in state.items()})
    matrices = [path for path, layer in theirs.items() if len(layer.get("weight", ())) == 2]
    if not matrices:
        raise NamesError("it has no fully connected layer")
    classes = theirs[matrices[-1]]["weight"][0]
    options = {"num_classes": classes, "aux_logits": False}
    model = _outline(name, **options)
    if len(_layers(model.state_shapes())) < len(theirs) and model.form.head is not None:
        options = {"num_classes": classes, "aux_logits": True}
        model = _outline(name, **options)
    ours = _layers(model.state_shapes())
    for number, ((path, want), (other, have)) in enumerate(zip(ours.items(), theirs.items(), strict=False), 1):
        if want != have:
            raise NamesError(
                f"layer {number} of {name}, {path}, has {_shapes(want)}; there {other[:80]} has {_shapes(have)}; "
                "safetensors keep no order, a .pth file does"
            )
    if len(ours) != len(theirs):
        raise NamesError(f"{name} has {len(ours)} layers with weights, the file {len(theirs)}")
    taken = zip(ours, theirs, strict=True)
    back = {_joined(path, word): _joined(other, word) for path, other in taken for word in ours[path]}
    arrays = {_joined(*_split(name)): array for name, array in state.items()}
    model.load_state_dict({name: arrays[back[_joined(*_split(name))]] for name in model.state_shapes()})
    report = f"{len(back)} arrays by order and shape, {len(theirs)} layers"
    return model, {"model": name, "options": options, "source": report}


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes by layer, in the order of the file, each under PyTorch's word."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        path, word = _split(name)
        layers.setdefault(path, {})[word] = shape
    return layers


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{word[:40]} {_times(shape)}" for word, shape in list(shapes.items())[:6])


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "one number"


def _list(names: list[str]) -> str:
    return ", ".join(name[:80] for name in names[:4]) + (f", … {len(names)} in all" if len(names) > 4 else "")
