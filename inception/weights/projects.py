"""The networks that other projects publish: their names of each layer, and how they prepare their pictures.

A network is the same list of layers everywhere, in the order in which they run, so that a table of a project's names
for the units of a row says all. Sources: the state dicts of torchvision (googlenet, inception_v3), of timm
(inception_v3, inception_v4, inception_resnet_v2), of facenet-pytorch (InceptionResnetV1), of pytorch-cifar (GoogLeNet)
and of the UvA deep-learning tutorial 5. tests/keys holds their names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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

_CIFAR_BLOCK = "b1.0/1 b2.0/1 b2.3/4 b3.0/1 b3.3/4 b3.6/7 b4.1/2"
_PYTORCH_CIFAR = {
    "conv1": "pre_layers: 0/1",
    **{f"inception{x}": f"{x[::-1]}: {_CIFAR_BLOCK}" for x in _MODULES},
    "fc1": "linear",
}
_CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_FACENET = {
    **{ours: theirs for ours, theirs in _RESNET.items() if ours[:4] == "conv" and ours != "conv7b"},
    "conv4b": "conv2d_4b",
    **{
        f"resnet_a{i}": f"repeat_1.{i - 1}: branch0 branch1.0 branch1.1 branch2.0 branch2.1 branch2.2 conv2d"
        for i in range(1, 6)
    },
    "reduction_a": _RESNET["reduction_a"],
    **{f"resnet_b{i}": f"repeat_2.{i - 1}: {_RESNET_17}" for i in range(1, 11)},
    "reduction_b": _RESNET["reduction_b"],
    **{f"resnet_c{i}": f"repeat_3.{i - 1}: {_RESNET_17}" for i in range(1, 6)},
    "resnet_c6": f"block8: {_RESNET_17}",
    "embedding": ": last_linear last_bn",
    "fc1": "logits",
}


def _imagenet() -> list[str]:
    """The names of ImageNet's 1000 classes as torchvision has them; its licence lies beside them."""
    return Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()


_IMAGENET = {"mean": [0.5] * 3, "std": [0.5] * 3, "classes": _imagenet()}  # pixels in [−1, 1]


class Project(NamedTuple):
    """A network as another project publishes it."""

    title: str
    model: str  # our name
    rows: Mapping[str, str]  # our row -> their name of it, or "prefix: names of its units"
    about: Mapping[str, Any]  # how pictures are prepared (see data.Preprocessing), and the names of the classes


PROJECTS = [
    Project(
        "torchvision's googlenet",
        "googlenet_torchvision",
        _GOOGLENET,
        # Its transform_input, after the usual normalisation, comes to [−1, 1].
        {"size": [224, 224], "resize": 256, "interpolation": "bilinear", **_IMAGENET},
    ),
    Project(
        "torchvision's (or timm's) inception_v3",
        "inception_v3",
        _V3,
        {"size": [299, 299], "resize": 342, "interpolation": "bilinear", **_IMAGENET},
    ),
    Project(
        "timm's inception_v4",
        "inception_v4",
        _V4,
        {"size": [299, 299], "resize": 341, "interpolation": "bicubic", **_IMAGENET},
    ),
    Project(
        "timm's inception_resnet_v2",
        "inception_resnet_v2",
        _RESNET,
        {"size": [299, 299], "resize": 333, "interpolation": "bicubic", **_IMAGENET},
    ),
    Project(
        "the UvA tutorial's GoogLeNet",
        "googlenet_small",
        _UVA,
        {
            "size": [32, 32],
            "mean": [0.49139968, 0.48215841, 0.44653091],
            "std": [0.24703223, 0.24348513, 0.26158784],
            "classes": _CIFAR10,
        },
    ),
    Project(
        "pytorch-cifar's GoogLeNet",
        "googlenet_cifar",
        _PYTORCH_CIFAR,
        {"size": [32, 32], "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010], "classes": _CIFAR10},
    ),
    Project(
        "facenet-pytorch's InceptionResnetV1",
        "inception_resnet_v1_facenet",
        _FACENET,
        # (v − 127.5) / 128 of values up to 255
        {"size": [160, 160], "mean": [0.5] * 3, "std": [128 / 255] * 3, "interpolation": "bilinear"},
    ),
]
