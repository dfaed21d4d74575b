"""What other projects call the arrays of these networks, and how they prepare their pictures.

A network is the same list of layers everywhere, in the order in which they run, so that a table of a project's names
for the units of a row says all. Sources: the state dicts of torchvision (googlenet, inception_v3), of timm
(inception_v3, inception_v4, inception_resnet_v2) and of the UvA deep-learning tutorial 5. Weights of any other project
are taken by order and shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from inception.models import Inception, create_model
from minigrad import nn
from minigrad.errors import MinigradError

# Each project's names of the units in a module, in the order in which they run.
_V3_35 = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
_V3_17 = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 "
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool"
)
_V3_8 = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b "
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool"
)
_V3 = {
    "conv1a": "Conv2d_1a_3x3",
    "conv2a": "Conv2d_2a_3x3",
    "conv2b": "Conv2d_2b_3x3",
    "conv3b": "Conv2d_3b_1x1",
    "conv4a": "Conv2d_4a_3x3",
    **{f"mixed5{x}": f"Mixed_5{x}: {_V3_35}" for x in "bcd"},
    "mixed6a": "Mixed_6a: branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    **{f"mixed6{x}": f"Mixed_6{x}: {_V3_17}" for x in "bcde"},
    "mixed7a": "Mixed_7a: branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    **{f"mixed7{x}": f"Mixed_7{x}: {_V3_8}" for x in "bc"},
    "aux": "AuxLogits: conv0 conv1 fc",
    "fc1": "fc",
}

_V4_A = "branch0 branch1.0 branch1.1 branch2.0 branch2.1 branch2.2 branch3.1"
_V4_B = "branch0 branch1.0 branch1.1 branch1.2 branch2.0 branch2.1 branch2.2 branch2.3 branch2.4 branch3.1"
_V4_C = "branch0 branch1_0 branch1_1a branch1_1b branch2_0 branch2_1 branch2_2 branch2_3a branch2_3b branch3.1"
_V4 = {
    "conv1a": "features.0",
    "conv2a": "features.1",
    "conv2b": "features.2",
    "mixed3a": "features.3: conv",
    "mixed4a": "features.4: branch0.0 branch0.1 branch1.0 branch1.1 branch1.2 branch1.3",
    "mixed5a": "features.5: conv",
    **{f"inception_a{i}": f"features.{5 + i}: {_V4_A}" for i in range(1, 5)},
    "reduction_a": "features.10: branch0 branch1.0 branch1.1 branch1.2",
    **{f"inception_b{i}": f"features.{10 + i}: {_V4_B}" for i in range(1, 8)},
    "reduction_b": "features.18: branch0.0 branch0.1 branch1.0 branch1.1 branch1.2 branch1.3",
    **{f"inception_c{i}": f"features.{18 + i}: {_V4_C}" for i in range(1, 4)},
    "fc1": "last_linear",
}

_RESNET_17 = "branch0 branch1.0 branch1.1 branch1.2 conv2d"
_RESNET = {
    "conv1a": "conv2d_1a",
    "conv2a": "conv2d_2a",
    "conv2b": "conv2d_2b",
    "conv3b": "conv2d_3b",
    "conv4a": "conv2d_4a",
    "mixed5b": f"mixed_5b: {_V4_A}",
    **{
        f"resnet_a{i}": f"repeat.{i - 1}: branch0 branch1.0 branch1.1 branch2.0 branch2.1 branch2.2 conv2d"
        for i in range(1, 11)
    },
    "reduction_a": "mixed_6a: branch0 branch1.0 branch1.1 branch1.2",
    **{f"resnet_b{i}": f"repeat_1.{i - 1}: {_RESNET_17}" for i in range(1, 21)},
    "reduction_b": "mixed_7a: branch0.0 branch0.1 branch1.0 branch1.1 branch2.0 branch2.1 branch2.2",
    **{f"resnet_c{i}": f"repeat_2.{i - 1}: {_RESNET_17}" for i in range(1, 10)},
    "resnet_c10": f"block8: {_RESNET_17}",
    "conv7b": "conv2d_7b",
    "fc1": "classif",
}

_BLOCK = "branch1 branch2.0 branch2.1 branch3.0 branch3.1 branch4.1"
_HEAD = "conv fc1 fc2"
_MODULES = ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
_GOOGLENET = {
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"inception{x}": f"inception{x}: {_BLOCK}" for x in _MODULES},
    "aux1": f"aux1: {_HEAD}",
    "aux2": f"aux2: {_HEAD}",
    "fc1": "fc",
}

# Here a unit is two members of a list, written "convolution/batch norm".
_UVA_BLOCK = "conv_1x1.0/1 conv_3x3.0/1 conv_3x3.3/4 conv_5x5.0/1 conv_5x5.3/4 max_pool.1/2"
_UVA = {
    "conv1": "input_net: 0/1",
    **{
        f"inception{x}": f"inception_blocks.{i}: {_UVA_BLOCK}"
        for x, i in zip(["3a", "3b", "4a", "4b", "4c", "4d", "5a", "5b"], (0, 1, 3, 4, 5, 6, 8, 9), strict=True)
    },
    "fc1": "output_net.2",
}

_TO_PLUS_MINUS_1 = {"mean": [0.5] * 3, "std": [0.5] * 3}


class Project(NamedTuple):
    """A network as another project publishes it."""

    title: str
    model: str  # our name
    rows: Mapping[str, str]  # our row -> their name of it, or "prefix: names of its units"
    sign: str  # a name that no other network has
    pictures: Mapping[str, Any]  # how they are prepared: see data.Preprocessing


PROJECTS = [
    Project(
        "torchvision's googlenet",
        "googlenet_torchvision",
        _GOOGLENET,
        "inception3a.branch1.conv.weight",
        # Its transform_input, after the usual normalisation, comes to [−1, 1].
        {"size": [224, 224], "resize": 256, "interpolation": "bilinear", **_TO_PLUS_MINUS_1},
    ),
    Project(
        "torchvision's (or timm's) inception_v3",
        "inception_v3",
        _V3,
        "Mixed_5b.branch1x1.conv.weight",
        {"size": [299, 299], "resize": 342, "interpolation": "bilinear", **_TO_PLUS_MINUS_1},
    ),
    Project(
        "timm's inception_v4",
        "inception_v4",
        _V4,
        "features.21.branch3.1.conv.weight",
        {"size": [299, 299], "resize": 341, "interpolation": "bicubic", **_TO_PLUS_MINUS_1},
    ),
    Project(
        "timm's inception_resnet_v2",
        "inception_resnet_v2",
        _RESNET,
        "block8.branch1.2.conv.weight",
        {"size": [299, 299], "resize": 333, "interpolation": "bicubic", **_TO_PLUS_MINUS_1},
    ),
    Project(
        "the UvA tutorial's GoogLeNet",
        "googlenet_small",
        _UVA,
        "inception_blocks.0.conv_1x1.0.weight",
        {
            "size": [32, 32],
            "mean": [0.49139968, 0.48215841, 0.44653091],
            "std": [0.24703223, 0.24348513, 0.26158784],
            "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        },
    ),
]

State = dict[str, np.ndarray]


class NamesError(MinigradError, ValueError):
    """Foreign weights do not fit the network."""


def recognise(state: Mapping[str, np.ndarray]) -> Project | None:
    """The project that names its arrays like this, with or without a prefix "model." or "module."."""
    return next((project for project in PROJECTS if project.sign in plain(state)), None)


def plain(state: Mapping[str, np.ndarray]) -> State:
    """Without the prefix that wrappers put before all names, and without counters of batches."""
    prefix = next((p for p in ("module.", "model.") if state and all(name.startswith(p) for name in state)), "")
    kept = {name.removeprefix(prefix): array for name, array in state.items()}
    return {name: array for name, array in kept.items() if not name.endswith(".num_batches_tracked")}


# ---- by name ----


def their_names(model: Inception, project: Project) -> dict[str, str]:
    """Our name -> theirs, for every array of the model, whose rows are all theirs."""
    names: dict[str, str] = {}
    for row, module in model.children():
        units = list(_units(row, module))
        if not units:
            continue
        prefix, _, inner = project.rows[row].partition(": ")
        theirs = [f"{prefix}.{name}" for name in inner.split()] if inner else [prefix]
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
        norm = re.sub(r"[^.]*$", second, first) if slash else f"{theirs}.bn"
        layers = [(f"{path}.conv", module.conv, conv), (f"{path}.batchnorm", module.batchnorm, norm)]
    return {
        f"{ours}.{name}": f"{other}.{_torch_name(name)}"
        for ours, layer, other in layers
        for name, value in vars(layer).items()
        if hasattr(value, "data") and not isinstance(value, nn.Module)
    }


def _torch_name(name: str) -> str:
    """PyTorch's word for an array of a layer."""
    return {"gamma": "weight", "beta": "bias"}.get(name, name)


def outward(model: nn.Module) -> dict[str, str]:
    """Our name -> the one in a PyTorch file: of the project that publishes this network, or ours in PyTorch's words."""
    if isinstance(model, Inception):
        for project in PROJECTS:
            if project.model == model.form.name and _rows(model) <= set(project.rows):
                return their_names(model, project)
    return {name: re.sub(r"[^.]*$", lambda end: _torch_name(end[0]), name) for name in model.state_dict()}


def _rows(model: Inception) -> set[str]:
    return {row for row, module in model.children() if _units(row, module)}


def inward(model: nn.Module, state: Mapping[str, np.ndarray]) -> State:
    """The arrays of a file that we have written, under our names."""
    back = {theirs: ours for ours, theirs in outward(model).items()}
    return {back.get(name, name): array for name, array in state.items()}


# ---- into a network ----


def adopt(
    state: Mapping[str, np.ndarray], name: str | None, build: Callable[..., Inception] = create_model
) -> tuple[Inception, dict[str, Any]]:
    """The network with foreign weights, and its description: model, options, preprocessing, "source" (a report).

    name   of the network, where the names of the arrays do not tell it
    Raises NamesError that says which array does not fit.
    """
    found, state = recognise(state), plain(state)
    if found is not None and name in (None, found.model):
        return _by_name(state, found, build)
    if name is None:
        raise NamesError("its arrays have names of no project known here: name the network (--model), to take them "
                         "by their order")  # fmt: skip
    return _by_order(state, name, build)


def _by_name(state: State, project: Project, build: Callable[..., Inception]) -> tuple[Inception, dict[str, Any]]:
    rows = project.rows
    heads = {row: rows[row].partition(":")[0] for row in rows if row.startswith("aux")}
    options = {
        "num_classes": _classes(state, f"{rows['fc1']}.weight"),
        "aux_logits": bool(heads) and all(any(n.startswith(f"{h}.") for n in state) for h in heads.values()),
    }
    model = build(project.model, **options)
    names = their_names(model, project)
    swapped = ""
    if options["aux_logits"] and len(heads) == 2:
        # The first head looks at 512 channels, the second at 528.
        first, second = heads.values()
        named = {name: parameter.shape for name, parameter in model.named_parameters()}
        if state.get(f"{first}.conv.conv.weight", np.empty(0)).shape == named["aux2.conv.conv.weight"]:
            other = {first: second, second: first}
            names = {n: re.sub(r"^aux\d", lambda head: other[head[0]], theirs) for n, theirs in names.items()}
            swapped = "; its heads had exchanged their names"
    ours = {name: state[theirs] for name, theirs in names.items() if theirs in state}
    rest = sorted(set(state) - set(names.values()))
    if lacking := [theirs for theirs in names.values() if theirs not in state]:
        raise NamesError(f"{project.title} without {_list(lacking)}")
    model.load_state_dict(ours)
    left = f"; left out: {_list(rest)}" if rest else ""
    report = f"{project.title}: {len(ours)} arrays by name{swapped}{left}"
    return model, {"model": project.model, "options": options, **project.pictures, "source": report}


def _by_order(state: State, name: str, build: Callable[..., Inception]) -> tuple[Inception, dict[str, Any]]:
    theirs = _layers(state)
    matrices = [path for path, layer in theirs.items() if layer.get("weight", np.empty(0)).ndim == 2]
    if not matrices:
        raise NamesError("it has no fully connected layer")
    classes = _classes(state, f"{matrices[-1]}.weight")
    options = {"num_classes": classes, "aux_logits": False}
    model = build(name, **options)
    if len(_layers(model.state_dict())) < len(theirs) and model.form.head is not None:
        options = {"num_classes": classes, "aux_logits": True}
        model = build(name, **options)
    ours = _layers(model.state_dict())
    taken: dict[tuple[str, str], np.ndarray] = {}
    for number, ((path, layer), (other, given)) in enumerate(zip(ours.items(), theirs.items(), strict=False), 1):
        want, have = ({word: array.shape for word, array in of.items()} for of in (layer, given))
        if want != have:
            raise NamesError(f"layer {number} of {name}, {path}, has {_shapes(want)}; there {other} has {_shapes(have)}"
                             "; safetensors keep no order, a .pth file does")  # fmt: skip
        taken |= {(path, word): array for word, array in given.items()}
    if len(ours) != len(theirs):
        raise NamesError(f"{name} has {len(ours)} layers with weights, the file {len(theirs)}")
    translated = {n: taken[n.rpartition(".")[0], _torch_name(n.rpartition(".")[2])] for n in model.state_dict()}
    model.load_state_dict(translated)
    report = f"{len(translated)} arrays by order and shape, {len(theirs)} layers"
    return model, {"model": name, "options": options, "source": report}


def _layers(state: Mapping[str, np.ndarray]) -> dict[str, State]:
    """The arrays by layer, in the order of the file, each under PyTorch's word."""
    layers: dict[str, State] = {}
    for name, array in state.items():
        path, _, word = name.rpartition(".")
        layers.setdefault(path, {})[_torch_name(word)] = array
    return layers


def _classes(state: State, name: str) -> int:
    weight = state.get(name, np.empty(0))
    if weight.ndim != 2:
        raise NamesError(f"its classifier {name!r} is missing, or no matrix")
    return len(weight)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{word} {'×'.join(map(str, shape))}" for word, shape in shapes.items())


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", … {len(names)} in all" if len(names) > 4 else "")
