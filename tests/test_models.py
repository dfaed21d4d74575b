"""The networks: counts as published, shapes, gradients, seeds, and that they learn."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from inception.models import ConvBlock, InceptionAux, InceptionBlock, NaiveInceptionBlock, create_model, list_models
from inception.models.googlenet import ARTICLE, BATCH_NORM, SMALL, GoogLeNetOutput
from minigrad import Tensor, gradcheck, nn, no_grad, ops, optim, summary
from minigrad.errors import MinigradError, ShapeError
from minigrad.random import Key, integers, normal, seeded


def pictures(*shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(normal(Key(11).fold(*shape), shape).astype(dtype))


def parameters(model: nn.Module) -> int:
    return sum(parameter.size for parameter in model.parameters())


# ---- Counts: networks.md, sections 1, 2.5 and 8.1, which print them from torch ----

# name, heads -> parameters, named parameters
COUNTS = {
    ("googlenet", True): (13_389_064, 242),
    ("googlenet", False): (7_008_824, 226),
    ("googlenet_bn", True): (13_385_816, 187),
    ("googlenet_bn", False): (7_005_832, 173),
    ("googlenet_small", False): (260_650, 198),
}


@pytest.mark.parametrize(("name", "heads"), COUNTS)
def test_parameter_counts(name: str, heads: bool) -> None:
    model = create_model(name, aux_logits=heads)
    assert (parameters(model), len(list(model.named_parameters()))) == COUNTS[name, heads]


def test_heads_of_the_small_network() -> None:
    """On top of the network without: 1×1 unit to 32, 512 to 128, 128 to 10."""

    def head(channels: int) -> int:
        return (channels + 1) * 32 + 2 * 32 + (512 + 1) * 128 + (128 + 1) * 10

    model = create_model("googlenet_small", aux_logits=True)
    assert parameters(model) == 260_650 + head(96) + head(128)


@pytest.mark.parametrize(
    ("name", "count", "stem"),
    [
        ("googlenet", 1_569_826_816, {"conv1": 112, "maxpool1": 56, "conv2": 56, "maxpool2": 28}),
        ("googlenet_bn", 1_582_671_872, {"conv1": 112, "maxpool1": 56, "conv2": 56, "conv3": 56, "maxpool2": 28}),
    ],
)
def test_multiply_adds_and_sizes_at_224(name: str, count: int, stem: dict[str, int]) -> None:
    """Of the whole network, of its heads, and the sizes of Table 1."""
    rows = summary(create_model(name), (3, 224, 224), depth=1).rows
    heads = [row for row in rows if row.path.startswith("aux")]
    assert sum(row.multiply_adds for row in heads) == 8_372_224
    assert sum(row.multiply_adds for row in rows) == count + 8_372_224
    sizes = {row.path: row.output[1] for row in rows if len(row.output) == 3}
    stages = {"inception3b": 28, "maxpool3": 14, "inception4e": 14, "maxpool4": 7, "inception5b": 7, "avgpool": 1}
    wanted = stem | stages
    assert {path: sizes[path] for path in wanted} == wanted


def test_multiply_adds_of_the_small_network() -> None:
    found = summary(create_model("googlenet_small"), (3, 32, 32))
    assert (found.multiply_adds, found.parameters) == (79_643_904, 260_650)


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


@pytest.mark.parametrize("form", [ARTICLE, BATCH_NORM, SMALL], ids=lambda form: form.name)
def test_widths_of_the_tables(form: Any) -> None:
    """The last column of each row is the sum of its branches."""
    for row in form.table:
        assert isinstance(row, str) or row.c1 + row.c3 + row.c5 + row.pool == row.out


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
        ("googlenet_small", (3, 32, 32), r"^googlenet_small takes a batch of pictures \(N, C, H, W\), got shape \(3, "),
    ],
)
def test_wrong_pictures_get_one_sentence(name: str, shape: tuple[int, ...], message: str) -> None:
    """A size that does not fit would otherwise fail in the last layer, fifty layers later."""
    with pytest.raises(ShapeError, match=message):
        create_model(name, aux_logits=False, num_classes=2)(pictures(*shape))


def test_wrong_channels_name_the_first_convolution() -> None:
    with pytest.raises(ShapeError, match=r"^conv1\.conv: conv2d got 1 channels, weight \(64, 3, 3, 3\) wants 3"):
        create_model("googlenet_small")(pictures(2, 1, 8, 8))


def test_grey_pictures() -> None:
    with no_grad():
        assert create_model("googlenet_small", in_channels=1)(pictures(2, 1, 8, 8)).shape == (2, 10)


def test_an_unknown_model_lists_the_known() -> None:
    with pytest.raises(MinigradError, match=f"no model 'googlnet'; choose one of: {', '.join(list_models())}"):
        create_model("googlnet")


@pytest.mark.parametrize("classes", [0, -1])
def test_there_is_at_least_one_class(classes: int) -> None:
    with pytest.raises(ShapeError, match="googlenet_small: num_classes must be at least 1, got"):
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
        np.testing.assert_array_equal(block(x).data, np.concatenate(parts, axis=1))


def test_naive_blocks_only_ever_get_wider() -> None:
    """networks.md 2.5: at 3a's and 3b's widths 387,072 and 1,770,496 weights, 303.5 M and 1,388 M multiply-adds."""
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


# name -> eps of batch norm, dropout before the classifier and in the heads: networks.md 2.2, 2.5, 8.1
CONSTANTS = {"googlenet": (1e-5, 0.4, 0.7), "googlenet_bn": (1e-3, 0.4, 0.7), "googlenet_small": (1e-5, 0.0, 0.7)}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    """Nothing fails with another eps or rate; only results differ."""
    model = create_model(name, aux_logits=True, num_classes=2)
    modules = dict(model.named_modules())
    norms = {module.eps for module in modules.values() if isinstance(module, nn.BatchNorm2d)}
    heads = {modules[f"{head}.dropout"].p for head in ("aux1", "aux2")}
    assert (norms, modules["dropout"].p, heads) == ({CONSTANTS[name][0]}, CONSTANTS[name][1], {CONSTANTS[name][2]})
    assert all(module.momentum == 0.1 for module in modules.values() if isinstance(module, nn.BatchNorm2d))


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
    ],
    ids=["ConvBlock", "InceptionBlock", "NaiveInceptionBlock", "InceptionAux", "InceptionAux, any size"],
)
def test_gradients_of_blocks(build: Any, shape: tuple[int, ...]) -> None:
    with seeded(0):
        block = drawn(build())
    x = Tensor(pictures(*shape, dtype="float64").data, requires_grad=True)
    gradcheck(block, x, parameters=block.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
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
    """The same name and seed: the same weights, whatever was built before."""
    options = {"aux_logits": False, "num_classes": 3}
    one = create_model(name, seed=5, **options).state_dict()
    nn.Linear(3, 3)
    again, other = (create_model(name, seed=seed, **options).state_dict() for seed in (5, 6))
    assert all((one[key] == again[key]).all() for key in one)
    drawn = [key for key in one if key.endswith(("conv.weight", "fc1.weight"))]
    assert all((one[key] != other[key]).any() for key in drawn)


def test_equal_layers_start_differently() -> None:
    """4b and 4c of the small network have one shape."""
    model = create_model("googlenet_small")
    assert (model.inception4b.branch1.conv.weight.data != model.inception4c.branch1.conv.weight.data).any()


def test_the_small_network_starts_he_normal() -> None:
    """Its convolutions; the classifier keeps torch's default (networks.md 8.1)."""
    model = create_model("googlenet_small")
    weight = model.inception5a.branch2[1].conv.weight.data
    assert weight.std() == pytest.approx(math.sqrt(2 / (48 * 9)), rel=0.03)
    assert np.abs(weight).max() > 3 * weight.std()  # not uniform
    assert np.abs(model.fc1.weight.data).max() <= 1 / math.sqrt(128)


def test_it_learns_one_batch_by_heart() -> None:
    """Sixteen pictures of noise: the loss falls from ln 10 to a small part of it, or something is wrong."""
    model = create_model("googlenet_small", aux_logits=True)
    x, labels = pictures(16, 3, 8, 8), integers(Key(1), 10, 16)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(15):
        model.set_key(Key(0).fold(step))
        aux1, aux2, logits = model(x)
        main = ops.cross_entropy(logits, labels)
        optimizer.zero_grad()
        (main + (ops.cross_entropy(aux1, labels) + ops.cross_entropy(aux2, labels)) * 0.3).backward()
        optimizer.step()
        losses.append(main.item())
    assert abs(losses[0] - math.log(10)) < 1
    assert losses[-1] < 0.2


def test_the_articles_closing_check() -> None:
    """Three random pictures of 224×224 through the full network, as a module run from the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "inception.models.googlenet"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["aux1: (3, 1000)", "aux2: (3, 1000)", "logits: (3, 1000)"]
    assert done.stderr == ""


# ---- summary ----


def test_summary_of_a_layer_by_hand() -> None:
    """3×3 from 3 to 4 channels on 5×6: 120 pixels·channels out, 27 multiply-adds each; it keeps its input."""
    found = summary(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), (3, 5, 6))
    (row,) = found.rows
    assert (row.path, row.kind, row.output) == ("0", "Conv2d", (4, 5, 6))
    assert (row.parameters, row.multiply_adds) == (4 * 27 + 4, 120 * 27)
    assert row.saved_bytes == 3 * 5 * 6 * 4


def test_what_two_ops_share_is_kept_once() -> None:
    """ReLU keeps its result, which the convolution after it keeps as its input."""
    found = summary(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)), (3, 6, 6))
    assert [row.saved_bytes for row in found.rows] == [3 * 36 * 4, 4 * 36 * 4, 0]


def test_rows_add_up_to_the_totals() -> None:
    model = create_model("googlenet_small", aux_logits=True)
    found = summary(model, (3, 16, 16))
    assert found.parameters == sum(row.parameters for row in found.rows) == parameters(model)
    assert found.multiply_adds == sum(row.multiply_adds for row in found.rows)
    assert found.saved_bytes == sum(row.saved_bytes for row in found.rows)


def test_depth_folds_layers_into_rows_of_the_papers_table() -> None:
    """With the same totals."""
    model = create_model("googlenet_small")
    whole, folded = summary(model, (3, 16, 16)), summary(model, (3, 16, 16), depth=1)
    assert whole[1:] == folded[1:]
    assert sum(row.parameters for row in folded.rows) == parameters(model)
    paths = [row.path.removeprefix("inception") for row in folded.rows]
    assert " ".join(paths) == "conv1 3a 3b maxpool1 4a 4b 4c 4d maxpool2 5a 5b avgpool flatten fc1"
    assert folded.rows[1].output == (64, 16, 16)
    assert folded.rows[1].kind == "InceptionBlock"


def test_summary_prints_a_table() -> None:
    lines = str(summary(nn.Sequential(nn.Conv2d(3, 64, 7)), (3, 9, 9))).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "total"]
    assert "9,472" in lines[1]
    assert "64×3×3" in lines[1]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_summary_leaves_no_trace(mode: str) -> None:
    """Running statistics that saw a batch of zeros, or a model left in training mode, would spoil what follows."""
    model = create_model("googlenet_small", aux_logits=True).train(mode != "eval")
    if mode == "mixed":  # a frozen stage
        model.inception3a.eval()
    modes = [module.training for _, module in model.named_modules()]
    state = model.state_dict()
    summary(model, (3, 16, 16))
    assert [module.training for _, module in model.named_modules()] == modes
    assert all((state[name] == value).all() for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_summary_cleans_up_after_an_error() -> None:
    model = create_model("googlenet_small").eval()
    with pytest.raises(ShapeError, match="got 4 channels"):
        summary(model, (4, 16, 16))
    assert not model.training
    assert model(pictures(1, 3, 8, 8)).shape == (1, 10)


def test_summary_wants_one_image() -> None:
    with pytest.raises(ShapeError, match=r"shape of one image \(C, H, W\), got \(1, 3, 8, 8\)"):
        summary(create_model("googlenet_small"), (1, 3, 8, 8))
