"""The networks: blocks, words of the tables, gradients, initialisation, and that they learn.

How they compare with what was published is in test_models_published.py and test_models_torch.py.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from published import figure

from inception import models
from inception.models import (
    ConvBlock,
    Inception,
    InceptionAux,
    InceptionBlock,
    NaiveInceptionBlock,
    create_model,
    list_models,
    register,
)
from inception.models.blocks import SAME, VALID, ConvReLU, Residual, Style, branches, conv, max_pool, residual
from inception.models.googlenet import GoogLeNet, GoogLeNetOutput
from inception.models.inception_resnet import embeddings
from inception.models.inception_v3 import FactorisedAux
from inception.models.network import Form, InceptionOutput, InputSize, Step
from minigrad import Tensor, gradcheck, nn, no_grad, ops, optim, summary
from minigrad.errors import DtypeError, MinigradError, ShapeError
from minigrad.random import Key, integers, normal, seeded, uniform


def pictures(*shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(normal(Key(11).fold(*shape), shape).astype(dtype))


def thin(name: str, **options: Any) -> Inception:
    """A network of full depth with as few channels as its table allows."""
    width = 1 / 4 if name == "googlenet_small" else 1 / 8 if name.startswith("googlenet") else 1 / 16
    return create_model(name, width=width, **options)


def parameters(model: nn.Module) -> int:
    return sum(parameter.size for parameter in model.parameters())


# ---- The article's network ----


def test_heads_of_the_small_network() -> None:
    """On top of the network without: 1×1 unit to 32, 512 to 128, 128 to 10."""

    def head(channels: int) -> int:
        return (channels + 1) * 32 + 2 * 32 + (512 + 1) * 128 + (128 + 1) * 10

    model = create_model("googlenet_small", aux_logits=True)
    assert parameters(model) == 260_650 + head(96) + head(128)


def test_named_parameters_come_in_the_order_of_the_paper() -> None:
    names = [name for name, _ in create_model("googlenet", num_classes=2).named_parameters()]
    assert names[:5] == [
        "conv1.conv.weight",
        "conv1.conv.bias",
        "conv1.batchnorm.gamma",
        "conv1.batchnorm.beta",
        "conv2.conv.weight",
    ]
    stages = list(dict.fromkeys(name.partition(".")[0].removeprefix("inception") for name in names))
    assert stages == ["conv1", "conv2", "3a", "3b", "4a", "aux1", "4b", "4c", "4d", "aux2", "4e", "5a", "5b", "fc1"]


def test_the_articles_class_takes_its_arguments_by_position() -> None:
    model = GoogLeNet(False, 7)
    assert (model.aux_logits, model.fc1.weight.shape) == (False, (7, 1024))
    assert GoogLeNet(num_classes=2).aux2.fc2.weight.shape == (2, 1024)


# ---- Shapes ----


@pytest.mark.parametrize("size", [8, 9, 32, 40])
def test_the_small_network_takes_any_size(size: int) -> None:
    with no_grad():
        assert create_model("googlenet_small", num_classes=7)(pictures(2, 3, size, size)).shape == (2, 7)


def test_heads_answer_in_training_only() -> None:
    """Named and in order; the main logits last, as they are computed."""
    model, x = create_model("googlenet_small", aux_logits=True, num_classes=7), pictures(2, 3, 16, 16)
    with no_grad():
        output = model(x)
        assert type(output) is GoogLeNetOutput
        assert output._fields == ("aux1", "aux2", "logits")
        assert [logits.shape for logits in output] == [(2, 7)] * 3
        assert model.eval()(x).shape == (2, 7)


def test_without_heads_there_are_logits_only() -> None:
    with no_grad():
        assert create_model("googlenet_small")(pictures(2, 3, 8, 8)).shape == (2, 10)


def test_heads_look_at_4a_and_4d() -> None:
    """Each head's gradient reaches its own stage and what is before it, and nothing after."""
    model = create_model("googlenet_small", aux_logits=True)
    for index, last in ((0, "4a"), (1, "4d")):
        model.zero_grad()
        model(pictures(2, 3, 8, 8))[index].sum().backward()
        reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        stages = ["3a", "3b", "4a", "4b", "4c", "4d"]
        wanted = {f"inception{stage}" for stage in stages[: stages.index(last) + 1]}
        assert reached == {"conv1", f"aux{index + 1}"} | wanted


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("googlenet", (1, 3, 225, 224), "^googlenet takes 224×224 pictures only, got 225×224: resize them$"),
        ("googlenet_bn", (1, 3, 31, 64), "^googlenet_bn takes pictures from 32×32 up, got 31×64: enlarge them$"),
        ("googlenet_small", (1, 3, 32, 7), "^googlenet_small takes pictures from 8×8 up, got 32×7: enlarge them$"),
        ("googlenet_small", (3, 32, 32), r"got \(3, 32, 32\): x\.reshape\(1, 3, 32, 32\) makes a batch"),
        (
            "googlenet_small",
            (2, 32, 32, 3),
            r"\(N, 3, H, W\), got \(2, 32, 32, 3\): move the channels with",
        ),
    ],
)
def test_wrong_pictures_get_one_sentence(name: str, shape: tuple[int, ...], message: str) -> None:
    """A size that does not fit would otherwise fail in the last layer, fifty layers later."""
    with pytest.raises(ShapeError, match=message):
        create_model(name, aux_logits=False, num_classes=2)(pictures(*shape))


def test_grey_pictures_for_a_network_of_colours() -> None:
    message = r"^googlenet_small takes pictures of shape \(N, 3, H, W\), got \(2, 1, 8, 8\)$"
    with pytest.raises(ShapeError, match=message):
        create_model("googlenet_small")(pictures(2, 1, 8, 8))


def test_grey_pictures() -> None:
    with no_grad():
        assert create_model("googlenet_small", in_channels=1)(pictures(2, 1, 8, 8)).shape == (2, 10)


def test_an_unknown_model_lists_the_known() -> None:
    with pytest.raises(MinigradError, match=f"no model .* 'googlenet'. Choose from {', '.join(list_models())}"):
        create_model("googlnet")


@pytest.mark.parametrize("classes", [0, -1, "10", 10.0])
def test_there_is_at_least_one_class(classes: int) -> None:
    with pytest.raises(ShapeError, match="googlenet_small: num_classes must be an int of at least 1, got"):
        create_model("googlenet_small", num_classes=classes)


# ---- Blocks ----


def test_an_inception_block_takes_the_papers_widths_by_position() -> None:
    """The article's own line: the numbers stand in the order of Table 1."""
    block = InceptionBlock(192, 64, 96, 128, 16, 32, 32)
    weights = {name: p.shape for name, p in block.named_parameters() if name.endswith("conv.weight")}
    assert weights == {
        "branch1.conv.weight": (64, 192, 1, 1),
        "branch2.0.conv.weight": (96, 192, 1, 1),
        "branch2.1.conv.weight": (128, 96, 3, 3),
        "branch3.0.conv.weight": (16, 192, 1, 1),
        "branch3.1.conv.weight": (32, 16, 5, 5),
        "branch4.1.conv.weight": (32, 192, 1, 1),
    }
    assert block.out_channels == 256
    with no_grad():
        assert block(pictures(2, 192, 5, 6)).shape == (2, 256, 5, 6)


def test_branches_are_joined_in_the_papers_order() -> None:
    block, x = InceptionBlock(3, 1, 2, 3, 4, 5, 6).eval(), pictures(2, 3, 5, 5)
    with no_grad():
        parts = [branch(x).data for branch in (block.branch1, block.branch2, block.branch3, block.branch4)]
        np.testing.assert_allclose(block(x).data, np.concatenate(parts, axis=1), rtol=1e-5, atol=1e-6)


def test_naive_blocks_only_ever_get_wider() -> None:
    """At 3a's and 3b's widths 387,072 and 1,770,496 weights, 303.5 M and 1,388 M multiply-adds."""
    one = NaiveInceptionBlock(192, 64, 128, 32)
    two = NaiveInceptionBlock(one.out_channels, 128, 192, 96)
    assert (one.out_channels, two.out_channels) == (416, 832)
    for block, weights in ((one, 387_072), (two, 1_770_496)):
        found = [p.size for name, p in block.named_parameters() if name.endswith("conv.weight")]
        assert sum(found) == weights
        row = summary(block, (next(block.parameters()).shape[1], 7, 7))
        assert row.multiply_adds == weights * 7 * 7  # at 28×28: 303.5 M and 1,388 M
        assert row.rows[-1].output == (block.out_channels, 7, 7)


def test_a_head_of_the_article_wants_14_pixels() -> None:
    """Average 5×5 with stride 3: 14 become 4, and 512·4·4 would not come of another size."""
    head = InceptionAux(8, 10, width=4, hidden=6)
    with no_grad():
        assert head(pictures(2, 8, 14, 14)).shape == (2, 10)
    with pytest.raises(ShapeError, match=r"^fc1: linear got an input of shape \(2, 36\), weight \(6, 64\) wants"):
        head(pictures(2, 8, 13, 13))


def test_a_head_is_its_layers_one_after_the_other() -> None:
    """Without the ReLU between them the two linear layers would be one."""
    head, x = InceptionAux(8, 10, width=4, hidden=6).eval(), pictures(2, 8, 14, 14)
    with no_grad():
        hidden = ops.relu(head.fc1(head.conv(ops.avg_pool2d(x, 5, 3)).flatten()))
        np.testing.assert_array_equal(head(x).data, head.fc2(hidden).data)
        head.train().set_key(Key(1))
        assert (head(x).data != head.fc2(hidden).data).any()  # and it drops


def test_a_unit_ends_in_a_relu() -> None:
    with no_grad():
        y = ConvBlock(3, 4, kernel_size=1)(pictures(2, 3, 5, 5)).data
    assert y.min() == 0
    assert 0.2 < (y == 0).mean() < 0.8


# name -> eps of batch norm (None: there is none), dropout before the classifier
CONSTANTS: dict[str, tuple[float | None, float]] = {
    "googlenet": (1e-5, 0.4),
    "googlenet_paper": (None, 0.4),
    "googlenet_bn": (1e-3, 0.4),
    "googlenet_torchvision": (1e-3, 0.2),
    "googlenet_naive": (1e-3, 0.4),
    "bn_inception": (1e-5, 0.0),
    "inception_v2": (1e-3, 0.2),
    "inception_v3": (1e-3, 0.5),
    "inception_v4": (1e-3, 0.2),
    "inception_resnet_v1": (1e-3, 0.2),
    "inception_resnet_v1_facenet": (1e-3, 0.6),
    "inception_resnet_v2": (1e-3, 0.2),
    "inception_resnet_v2_paper": (1e-3, 0.2),
    "googlenet_small": (1e-5, 0.0),
    "googlenet_cifar": (1e-5, 0.0),
    "inception_v3_cifar": (1e-3, 0.5),
    "inception_v4_cifar": (1e-3, 0.2),
    "inception_resnet_v2_cifar": (1e-3, 0.2),
}


@pytest.mark.parametrize("name", list_models())
def test_constants(name: str) -> None:
    """Nothing fails with another eps or rate; only results differ."""
    modules = dict(thin(name).named_modules())
    norms = {(module.eps, module.momentum) for module in modules.values() if isinstance(module, nn.BatchNorm2d)}
    eps, dropout = CONSTANTS[name]
    assert (norms, modules["dropout"].p) == (set() if eps is None else {(eps, 0.1)}, dropout)
    heads = {module.p for path, module in modules.items() if path.startswith("aux") and isinstance(module, nn.Dropout)}
    assert heads <= {0.7}
    assert thin(name, dropout=0.1).dropout.p == 0.1


# ---- Words of the tables ----


def built(layer: Any, in_channels: int = 3, **style: Any) -> nn.Module:
    return layer(in_channels, Style(**style))[0]


def test_padding_keeps_the_grid_or_is_none() -> None:
    with no_grad():
        x = pictures(2, 3, 9, 8)
        assert built(conv(4, (1, 7), 1, SAME))(x).shape == (2, 4, 9, 8)
        assert built(conv(4, (7, 1)))(x).shape == (2, 4, 9, 8)
        assert built(conv(4, 3, 1, VALID))(x).shape == (2, 4, 7, 6)
        assert built(conv(4, 3, 2))(x).shape == (2, 4, 5, 4)
        assert built(max_pool(3, 2, VALID))(x).shape == (2, 3, 4, 3)


def test_branches_learn_their_channels() -> None:
    """A branch of one layer is that layer; a fork is a branch's last layer."""
    layer = branches([conv(4, 1)], [conv(2, 1), branches([conv(5, (1, 3))], [conv(6, (3, 1))])], [max_pool(3)])
    module, width = layer(3, Style())
    assert width == 4 + 5 + 6 + 3
    assert [name for name, _ in module.children()] == ["branch1", "branch2", "branch3"]
    assert "branch2.1.branch2.conv.weight" in dict(module.named_parameters())
    with no_grad():
        assert module(pictures(2, 3, 5, 5)).shape == (2, width, 5, 5)


def test_a_residual_module_is_its_formula() -> None:
    """relu(x + scale · up(branches(x))), the sum before the ReLU."""
    x = pictures(2, 3, 5, 5)
    for relu in (True, False):
        module = built(residual(0.2, [conv(4, 1)], [conv(2, 1), conv(5, 3)], relu=relu)).eval()
        assert isinstance(module, Residual)
        assert module.up.weight.shape == (3, 9, 1, 1)
        with no_grad():
            y = x.data + np.float32(0.2) * module.up(module.branches(x)).data
            np.testing.assert_allclose(module(x).data, np.maximum(y, 0) if relu else y, rtol=1e-6)


def test_a_unit_without_batch_norm() -> None:
    unit, x = ConvReLU(3, 4, kernel_size=3, padding=1), pictures(2, 3, 5, 5)
    with no_grad():
        np.testing.assert_array_equal(unit(x).data, np.maximum(unit.conv(x).data, 0))


@pytest.mark.parametrize("width", [0.25, 2.0])
def test_width_multiplies_every_layer(width: float) -> None:
    """But not the pictures' channels or the classes."""
    plain, scaled = (
        create_model("googlenet_small", aux_logits=True),
        create_model("googlenet_small", aux_logits=True, width=width),
    )
    for (name, p), q in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        fixed = {"conv1.conv.weight": [1, 2, 3], "fc1.bias": [0], "fc1.weight": [0]}.get(name, [2, 3])
        fixed += [0] if ".fc2" in name else []
        wanted = tuple(n if axis in fixed else n * width for axis, n in enumerate(p.shape))
        assert (name, q.shape) == (name, wanted)


@pytest.mark.parametrize("width", [0.3, 1 / 32, 0.0, -1.0, math.nan, math.inf])
def test_width_leaves_whole_channels(width: float) -> None:
    with pytest.raises(ShapeError, match=r"^width .* makes .* channels of \d+: take one as 0.25, 0.125 or 2$"):
        create_model("googlenet_small", width=width)


def test_a_row_that_does_not_add_up_is_refused() -> None:
    form = Form("toy", "", InputSize(8), [Step("one", branches([conv(4, 1)], [conv(5, 1)]), 10)])
    with pytest.raises(ShapeError, match="toy, row one: its branches sum to 9 channels, not 10"):
        Inception(form)


def test_a_network_of_ones_own_is_registered() -> None:
    form = Form("toy", "", InputSize(8), [Step("one", branches([conv(4, 1)], [conv(6, 1)]), 10)], classes=3)
    with pytest.raises(MinigradError, match="there is no model 'toy'"):
        create_model("toy")
    try:
        register(form)
        assert create_model("toy").fc1.weight.shape == (3, 10)
        register(form._replace(classes=5))  # again: another version of it
        assert create_model("toy").fc1.weight.shape == (5, 10)
        assert "toy" in list_models()
    finally:
        models._forms.cache_clear()
    with pytest.raises(MinigradError, match="there is a model 'googlenet' in this package already"):
        register(form._replace(name="googlenet"))


# ---- Gradients, in float64 ----


def drawn(model: nn.Module) -> nn.Module:
    model.set_key(Key(1))
    return model.astype("float64")


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: ConvBlock(3, 4, kernel_size=3, stride=2, padding=1), (2, 3, 7, 6)),
        (lambda: InceptionBlock(3, 2, 3, 4, 2, 3, 2), (2, 3, 6, 5)),
        (lambda: NaiveInceptionBlock(3, 2, 4, 3), (2, 3, 6, 5)),
        (lambda: InceptionAux(3, 5, width=2, hidden=7), (2, 3, 14, 14)),
        (lambda: InceptionAux(3, 5, pool=nn.AdaptiveAvgPool2d(4), width=2, hidden=7), (2, 3, 7, 6)),
        (lambda: ConvReLU(3, 4, kernel_size=3), (2, 3, 7, 6)),
        (lambda: FactorisedAux(3, 5, unit=ConvBlock, width=2, hidden=7), (2, 3, 17, 17)),
        (lambda: FactorisedAux(3, 5, unit=ConvBlock, pool=nn.AdaptiveAvgPool2d(5), width=2, hidden=7), (2, 3, 4, 4)),
    ],
    ids=lambda value: "" if callable(value) else "×".join(map(str, value)),
)
@pytest.mark.usefixtures("host_kernels")
def test_gradients_of_blocks(build: Any, shape: tuple[int, ...]) -> None:
    with seeded(0):
        block = drawn(build())
    x = Tensor(pictures(*shape, dtype="float64").data, requires_grad=True)
    gradcheck(block, x, parameters=block.parameters())


@pytest.mark.parametrize("name", list_models())
@pytest.mark.usefixtures("host_kernels")
def test_gradients_of_every_row(name: str) -> None:
    """Each kind of module in the table once, at reduced width: rows that differ in their widths alone are one kind."""
    form, seen = create_model(name, width=0.25).form if name == "googlenet_small" else thin(name).form, set()
    style, channels = Style(form.unit, 1 / 4 if name == "googlenet_small" else 1 / 8), 3
    for step in form.steps:
        with seeded(0):
            row, after = step.layer(channels, style)
        kind = re.sub(r" → \d+", "", figure(row))
        if kind not in seen:
            seen.add(kind)
            x = Tensor(pictures(2, channels, 8, 6, dtype="float64").data, requires_grad=True)
            gradcheck(drawn(row), x, parameters=row.parameters(), steps=(1e-6, 1e-7, 1e-8))
        channels = after


@pytest.mark.parametrize("name", ["inception_v3_cifar", "inception_v4_cifar", "inception_resnet_v2_cifar"])
@pytest.mark.usefixtures("host_kernels")
def test_gradients_of_whole_deep_networks(name: str) -> None:
    """From the pictures through up to 246 convolutions, with the head."""
    model = drawn(thin(name, aux_logits=True, num_classes=4, dropout=0.3))
    for path, parameter in model.named_parameters():
        if parameter.ndim == 1:  # where nothing arrives, a shift of 0 puts the ReLU on its kink
            parameter.data += 0.2 * uniform(Key(3).fold(path), parameter.shape)
    x = pictures(3, 3, 16, 16, dtype="float64")
    gradcheck(model, x, parameters=model.parameters(), steps=(1e-8, 1e-9, 1e-10))


@pytest.mark.usefixtures("host_kernels")
def test_gradients_of_the_embedding() -> None:
    model = drawn(thin("inception_resnet_v1_facenet", num_classes=4))
    x = pictures(4, 112, dtype="float64")
    x = Tensor(x.data, requires_grad=True)
    gradcheck(model.embedding, x, parameters=model.embedding.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.usefixtures("host_kernels")
def test_gradients_of_the_whole_network(mode: str) -> None:
    """198 parameters and two heads through one random direction: a wrong sign anywhere shows."""
    model = drawn(create_model("googlenet_small", aux_logits=True, num_classes=4, dropout=0.3)).train(mode == "train")
    gradcheck(model, pictures(3, 3, 8, 8, dtype="float64"), parameters=model.parameters())


def test_every_parameter_learns() -> None:
    """Apart from biases in front of batch norm, whose gradient is zero."""
    model = create_model("googlenet_small", aux_logits=True)
    labels = np.array([1, 7, 3, 3])
    loss = sum((ops.cross_entropy(y, labels) for y in model(pictures(4, 3, 16, 16))), start=Tensor(0.0))
    loss.backward()
    idle = [name for name, p in model.named_parameters() if np.abs(p.grad).max() < 1e-6]
    assert all(name.endswith("conv.bias") for name in idle), idle


# ---- Seeds, learning ----


@pytest.mark.parametrize("name", list_models())
def test_seeds_choose_the_weights(name: str) -> None:
    """The same name, options and seed: the same weights, whatever was built before."""
    one = thin(name, seed=5, num_classes=3).state_dict()
    nn.Linear(3, 3)
    again, other = (thin(name, seed=seed, num_classes=3).state_dict() for seed in (5, 6))
    assert all((one[key] == again[key]).all() for key in one)
    drawn = [key for key in one if one[key].ndim > 1]
    assert len(drawn) >= 10
    assert all((one[key] != other[key]).any() for key in drawn)


def test_equal_layers_start_differently() -> None:
    """4b and 4c of the small network have one shape."""
    model = create_model("googlenet_small")
    assert (model.inception4b.branch1.conv.weight.data != model.inception4c.branch1.conv.weight.data).any()


def test_the_small_network_starts_he_normal() -> None:
    """Its convolutions; the classifier keeps torch's default."""
    model = create_model("googlenet_small")
    weight = model.inception5a.branch2[1].conv.weight.data
    assert weight.std() == pytest.approx(math.sqrt(2 / (48 * 9)), rel=0.03)
    assert np.abs(weight).max() > 3 * weight.std()  # not uniform
    assert np.abs(model.fc1.weight.data).max() <= 1 / math.sqrt(128)


def weights_of(name: str, path: str, **options: Any) -> np.ndarray:
    return dict(create_model(name, **options).named_parameters())[path].data


@pytest.mark.parametrize(
    ("name", "path", "std"),
    [
        ("googlenet_torchvision", "inception3a.branch2.1.conv.weight", 0.01),
        ("googlenet_torchvision", "aux1.fc1.weight", 0.01),
        ("inception_v3", "mixed5b.branch2.1.conv.weight", 0.1),
        ("inception_v3", "aux.conv1.conv.weight", 0.1),
        ("inception_v3", "aux.fc.weight", 0.001),
        ("inception_v3", "fc1.weight", 0.1),
        ("inception_v2", "conv1.0.weight", 0.88),  # truncation at two standard deviations takes 12 %
        ("inception_v2", "conv1.1.conv.weight", 0.88),
        ("inception_v2", "inception4a.branch2.0.conv.weight", 0.09 * 0.88),
        ("inception_v2", "inception4a.branch4.1.conv.weight", 0.1 * 0.88),
        ("inception_v2", "inception4a.branch2.1.conv.weight", math.sqrt(2 / (16 * 9))),
        ("inception_v4_cifar", "inception_a1.branch2.1.conv.weight", math.sqrt(2 / (16 * 9))),
        ("inception_v2", "conv2.conv.weight", 0.1 * 0.88),
        ("inception_v4_cifar", "fc1.weight", math.sqrt(2 / (384 + 100))),
        ("inception_resnet_v2_cifar", "resnet_a1.up.weight", math.sqrt(2 / (32 + 80))),
        ("inception_resnet_v2_cifar", "fc1.weight", math.sqrt(2 / (384 + 100))),
        ("googlenet_paper", "inception3a.branch2.1.conv.weight", math.sqrt(1 / (24 * 9))),
    ],
)
def test_weights_start_as_published(name: str, path: str, std: float) -> None:
    """Normal, of this standard deviation; the paper's network uniform."""
    weight = weights_of(name, path, width=1 / 4, num_classes=100)
    assert weight.mean() == pytest.approx(0, abs=4 * std / math.sqrt(weight.size))
    assert weight.std() == pytest.approx(std, rel=4 / math.sqrt(weight.size))
    if name == "googlenet_paper":
        assert np.abs(weight).max() < 1.74 * std


def test_biases_start_as_published() -> None:
    """Caffe: 0.2 everywhere but in the three classifiers. TF-slim: zero. torchvision leaves PyTorch's default."""
    biases = {name: p.data for name, p in thin("googlenet_paper").named_parameters() if name.endswith("bias")}
    zero = {name for name, bias in biases.items() if (bias == 0).all()}
    assert zero == {"fc1.bias", "aux1.fc2.bias", "aux2.fc2.bias"}
    assert all((bias == np.float32(0.2)).all() for name, bias in biases.items() if name not in zero)
    for name, path in (("inception_v2", "fc1.bias"), ("inception_resnet_v1", "resnet_b1.up.bias")):
        assert (dict(thin(name).named_parameters())[path].data == 0).all()
    assert dict(thin("inception_v3").named_parameters())["fc1.bias"].data.std() > 0


# ---- Learning ----


def coarse_pictures(n: int, size: int) -> Tensor:
    """Random patches: noise of single pixels would look alike to a network that averages it away."""
    cell = -(-size // 4)
    patches = normal(Key(1), (n, 3, 4, 4)).repeat(cell, 2).repeat(cell, 3)[:, :, :size, :size]
    return Tensor(np.ascontiguousarray(2 * patches, dtype="float32"))


def step_of(model: nn.Module, x: Tensor, labels: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """The training loss, heads weighing 0.3, and all logits."""
    outputs = model(x)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    *heads, main = (ops.cross_entropy(logits, labels) for logits in outputs)
    return main + sum(heads, start=Tensor(0.0)) * 0.3, outputs


# name -> picture size; others train at their least
SIZES = {name: 107 for name in list_models() if name.startswith("inception_") and not name.endswith("cifar")}
SIZES |= {"googlenet": 224, "googlenet_paper": 224, "inception_v2": 32, "inception_v4": 139, "inception_v4_cifar": 16}
SLOW = ["googlenet", "googlenet_paper", "inception_v4", "inception_resnet_v1", "inception_resnet_v2"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in list_models()])
def test_it_learns_one_batch_by_heart(name: str) -> None:
    """Eight pictures: the loss begins where the spread of the logits puts it and falls below a half."""
    form = create_model("googlenet_small", width=0.25).form if name == "googlenet_small" else thin(name).form
    heads = form.head is not None and form.size.least_with_heads == 1
    model = thin(name, num_classes=10, aux_logits=heads, dropout=0.0)
    x, labels = coarse_pictures(8, SIZES.get(name, form.size.least)), integers(Key(1), 10, 8)
    for path, module in model.named_modules():
        if path.startswith("aux") and isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = optim.AdamW(model.parameters(), lr=0.005 if name == "googlenet_paper" else 0.01)
    first = None
    for _ in range(100):
        loss, outputs = step_of(model, x, labels)
        main = ops.cross_entropy(outputs[-1], labels).item()
        if first is None:
            first = main
            spread = outputs[-1].data.std(axis=1).max()  # of normal logits: ln K + spread²/2, and what the labels add
            assert abs(first - math.log(10)) < 0.1 + spread + spread**2 / 2
            assert math.isfinite(first)
        if main < 0.5:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert main < 0.5


@pytest.mark.parametrize("name", ["googlenet_paper", "inception_v3_cifar", "inception_resnet_v2_cifar"])
def test_every_parameter_of_the_deep_networks_learns(name: str) -> None:
    """A branch or head that is built but not run would have no gradient."""
    model = thin(name, aux_logits=True)
    loss, _ = step_of(model, coarse_pictures(4, 224 if name == "googlenet_paper" else 16), np.array([1, 7, 3, 3]))
    loss.backward()
    assert [path for path, p in model.named_parameters() if p.grad is None or not np.abs(p.grad).max() > 0] == []


def test_heads_look_at_the_published_rows() -> None:
    """A head one module earlier would have the same sizes."""
    looks_at = {"googlenet_cifar": ["inception4a", "inception4d"], "inception_v3_cifar": ["mixed6e"]}
    looks_at |= {"inception_v4_cifar": ["inception_b7"], "inception_resnet_v2_cifar": ["resnet_b20"]}
    for name, rows in looks_at.items():
        children = [child for child, _ in thin(name, aux_logits=True).children()]
        assert [a for a, b in itertools.pairwise(children) if b.startswith("aux")] == rows


def test_heads_of_v3_are_named() -> None:
    model = thin("inception_v3_cifar", aux_logits=True, num_classes=7)
    with no_grad():
        output = model(pictures(2, 3, 32, 32))
        assert type(output) is InceptionOutput
        assert output._fields == ("aux", "logits")
        assert model.eval()(pictures(2, 3, 32, 32)).shape == (2, 7)


def test_embeddings_of_a_network_with_heads() -> None:
    """Heads hang on the side: they are not on the way to the classifier."""
    model = thin("googlenet_small", aux_logits=True).eval()
    with no_grad():
        found = embeddings(model, pictures(2, 3, 32, 32)).data
    assert found.shape == (2, model.fc1.weight.shape[1])


def test_embeddings_have_length_one() -> None:
    model = thin("inception_resnet_v1_facenet", num_classes=3).eval()
    with no_grad():
        found = embeddings(model, pictures(3, 3, 80, 80)).data
        assert found.shape == (3, 512)
        np.testing.assert_allclose((found**2).sum(axis=1), 1, rtol=1e-5)
        logits = model(pictures(3, 3, 80, 80)).data
    direction = (logits - model.fc1.bias.data) / (found @ model.fc1.weight.data.T)  # one length a picture
    np.testing.assert_allclose(direction, direction[:, :1].repeat(3, axis=1), rtol=1e-3)


def test_the_articles_closing_check() -> None:
    """Three random pictures of 224×224 through the full network, as a module run from the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "inception.models.googlenet"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["aux1: (3, 1000)", "aux2: (3, 1000)", "logits: (3, 1000)"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    "given", [[[1.0]], np.zeros((1, 3, 8, 8), np.uint8), None], ids=["list", "ndarray", "NoneType"]
)
def test_pictures_that_are_no_tensor(given: Any, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.id
    with pytest.raises(DtypeError, match=f"googlenet_small works on tensors, got {kind}: wrap the array in minigrad"):
        create_model("googlenet_small")(given)


def test_a_width_that_is_no_number() -> None:
    with pytest.raises(ShapeError, match="width must be a number, got '1/4'"):
        create_model("googlenet_small", width="1/4")  # type: ignore[arg-type]
