"""Every network of the family beside what was published: counts, sizes, and the figure of each row.

Weights are not drawn and layers not computed here, only their shapes: the kernels are replaced by ones that return
zeros, so that the networks pass at full width and native size in no time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from published import figure, rows

from inception.models import Inception, compare, create_model, describe_model, list_models
from inception.models.googlenet import table_1_beside_ours
from minigrad import Tensor, nn, no_grad, ops, summary
from minigrad.errors import MinigradError, ShapeError
from minigrad.kernels import kernels
from minigrad.nn import init, layers
from minigrad.nn.module import observer


def zeros(*shape: int) -> np.ndarray:
    """Channels-last, of memory that costs nothing until it is written."""
    n, c, h, w = shape
    return np.zeros((n, h, w, c), np.float32).transpose(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialise(weight: Any, bias: Any) -> None:
        for parameter in [weight] if bias is None else [weight, bias]:
            parameter.data.fill(0)

    monkeypatch.setattr(layers, "_initialise", initialise)
    monkeypatch.setattr(init, "_fill", lambda weight, values: None)
    for name in ("normal", "uniform"):
        monkeypatch.setattr(init, name, lambda key, shape: np.zeros(()))

    def conv2d(x: Any, weight: Any, bias: Any, window: Any) -> np.ndarray:
        return zeros(len(x), len(weight), *window.output)

    def pool(x: Any, window: Any, *options: Any) -> np.ndarray:
        return zeros(*x.shape[:2], *window.output)

    def same(x: Any, *options: Any) -> np.ndarray:
        return zeros(*x.shape)

    def statistics(x: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(x.shape[1]), np.ones(x.shape[1])

    def concat(xs: Any) -> np.ndarray:
        return zeros(len(xs[0]), sum(x.shape[1] for x in xs), *xs[0].shape[2:])

    def unit(x: Any, weight: Any, window: Any, *options: Any) -> np.ndarray:
        return conv2d(x, weight, None, window)

    def with_statistics(*given: Any) -> tuple[np.ndarray, ...]:
        y = unit(*given)
        return y, *statistics(y)

    fused = {"conv_bn_relu": unit, "conv2d_statistics": with_statistics}
    fakes = {"conv2d": conv2d, "max_pool": pool, "avg_pool": pool, "batch_norm": same, "lrn": same}
    for name, function in {**fakes, **fused, "statistics": statistics, "concat": concat}.items():
        monkeypatch.setattr(kernels(np.zeros(1)), name, function)


def native(model: Inception) -> tuple[int, int, int]:
    return (3, model.form.size.native, model.form.size.native)


# ---- Counts ----

# name, heads -> parameters, named parameters, multiply-adds of one picture at the native size
COUNTS = {
    ("googlenet", True): (13_389_064, 242, 1_569_826_816 + 8_372_224),
    ("googlenet", False): (7_008_824, 226, 1_569_826_816),
    ("googlenet_torchvision", True): (13_004_888, 187, 1_498_376_192 + 8_372_224),
    ("googlenet_torchvision", False): (6_624_904, 173, 1_498_376_192),
    ("googlenet_paper", True): (13_378_280, 128, 1_582_671_872 + 8_372_224),
    ("googlenet_paper", False): (6_998_552, 116, 1_582_671_872),
    ("googlenet_bn", True): (13_385_816, 187, 1_582_671_872 + 8_372_224),
    ("googlenet_bn", False): (7_005_832, 173, 1_582_671_872),
    ("bn_inception", False): (11_295_240, 278, 2_032_600_064),
    ("inception_v2", False): (11_188_288, 210, 1_934_857_216),
    ("inception_v3", True): (27_161_264, 292, 5_713_216_096 + 5_683_200),
    ("inception_v3", False): (23_834_568, 284, 5_713_216_096),
    ("inception_v4", True): (46_039_280, 457, 12_253_974_624 + 6_502_400),
    ("inception_v4", False): (42_679_816, 449, 12_253_974_624),
    ("inception_resnet_v2", True): (59_211_120, 702, 13_155_794_016 + 6_707_200),
    ("inception_resnet_v2", False): (55_843_464, 694, 13_155_794_016),
    ("inception_resnet_v2_paper", False): (32_433_928, 378, 9_257_953_632),
    ("inception_resnet_v1", False): (22_756_328, 363, 6_206_361_696),
    ("inception_resnet_v1_facenet", False): (23_995_624, 380, 1_418_174_304),
    ("googlenet_small", False): (260_650, 198, 79_643_904),
    ("googlenet_cifar", False): (6_166_250, 258, 1_521_756_160),
    # Ten classes instead of a thousand are all that sets the parameters of these apart from their originals'.
    ("inception_v3_cifar", True): (27_161_264 - 990 * (2049 + 769), 292, None),
    ("inception_v3_cifar", False): (23_834_568 - 990 * 2049, 284, None),
    ("inception_v4_cifar", False): (42_679_816 - 990 * 1537, 449, None),
    ("inception_resnet_v2_cifar", False): (55_843_464 - 990 * 1537, 694, None),
}
# The paper's stem, then two naive modules: 387,072 and 1,770,496 weights, 303.5 M and 1,388 M multiply-adds.
STEM_WEIGHTS, STEM_COST = 3 * 64 * 49 + 64 * 64 + 64 * 192 * 9, 118_013_952 + (64 * 64 + 64 * 192 * 9) * 56 * 56
COUNTS["googlenet_naive", False] = (
    STEM_WEIGHTS + 387_072 + 1_770_496 + 2 * (64 + 64 + 192 + (64 + 128 + 32) + (128 + 192 + 96)) + 833 * 1000,
    3 * 9 + 2,
    STEM_COST + (387_072 + 1_770_496) * 28 * 28 + 832 * 1000,
)


def test_every_model_is_counted() -> None:
    assert {name for name, _ in COUNTS} == set(list_models())


@pytest.mark.parametrize(("name", "heads"), COUNTS)
def test_counts(name: str, heads: bool) -> None:
    model = create_model(name, aux_logits=heads)
    parameters, named, multiply_adds = COUNTS[name, heads]
    assert len(list(model.named_parameters())) == named
    found = summary(model, native(model))
    assert found.parameters == parameters == sum(row.parameters for row in found.rows)
    if multiply_adds is not None:
        assert found.multiply_adds == multiply_adds


def test_facenet_without_its_classifier() -> None:
    model = create_model("inception_resnet_v1_facenet")
    assert sum(parameter.size for parameter in model.parameters()) - sum(p.size for p in model.fc1.parameters()) == (
        23_482_624
    )
    assert sum(isinstance(module, nn.BatchNorm2d) for _, module in model.named_modules()) == 112


# ---- Figures ----

PUBLISHED = [
    "googlenet",
    "googlenet_torchvision",
    "googlenet_paper",
    "bn_inception",
    "inception_v2",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v1",
    "inception_resnet_v2",
    "inception_resnet_v2_paper",
    "googlenet_cifar",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_the_published_ones(name: str) -> None:
    """Kernel, stride, padding, width and order of every layer; size, channels and parameters of every row."""
    model = create_model(name, aux_logits=False)
    found = {row.path: row for row in summary(model, native(model), depth=1).rows}
    published = rows(name)
    assert len(published) == len(model.form.steps)
    for step, row in zip(model.form.steps, published, strict=True):
        ours = found[step.name]
        assert (step.name, figure(getattr(model, step.name))) == (step.name, row.figure)
        assert (step.name, ours.output, ours.parameters) == (step.name, row.output, row.parameters)


def test_facenet_is_the_papers_network_and_one_module_more() -> None:
    paper, facenet = create_model("inception_resnet_v1").form, create_model("inception_resnet_v1_facenet")
    assert [step.name for step in facenet.form.steps[:-1]] == [step.name for step in paper.steps]
    assert [figure(getattr(facenet, step.name)) for step in paper.steps] == [
        row.figure for row in rows("inception_resnet_v1")
    ]
    five, six = figure(facenet.resnet_c5), figure(facenet.resnet_c6)
    assert five.replace("×0.2 ⟶ + input ⟶ ReLU", "×1 ⟶ + input (no ReLU)") == six != five
    sizes = {row.path: row.output[1:] for row in summary(facenet, (3, 160, 160), depth=1).rows}
    assert [sizes[name] for name in ("resnet_a1", "resnet_b1", "resnet_c6")] == [(17, 17), (8, 8), (3, 3)]


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4", "inception_resnet_v2"])
def test_cifar_forms_keep_every_layer(name: str) -> None:
    """The same units with the same weights in the same order, on grids of 32, 16, 8 and 4."""
    full, small = create_model(name, aux_logits=False), create_model(f"{name}_cifar")
    shapes = [[p.shape for p in list(model.parameters())[:-2]] for model in (full, small)]
    assert shapes[0] == shapes[1]
    sizes = [row.output[1:] for row in summary(small, (3, 32, 32), depth=1).rows if len(row.output) == 3]
    assert list(dict.fromkeys(sizes)) == [(32, 32), (16, 16), (8, 8), (4, 4), (1, 1)]


@pytest.mark.parametrize(("name", "heads"), COUNTS)
def test_parameters_come_in_the_order_in_which_layers_run(
    monkeypatch: pytest.MonkeyPatch, name: str, heads: bool
) -> None:
    """So that weights can be matched with another implementation's without names: branch by branch, that is."""
    monkeypatch.setattr(nn.Branches, "forward", lambda self, x: ops.concat([b(x) for _, b in self.children()]))
    model = create_model(name, aux_logits=heads)
    ran: list[nn.Module] = []

    class Order:
        def enter(self, *modules: nn.Module) -> None:
            for module in modules:  # a unit is one op
                ran.extend([module.conv, module.batchnorm] if isinstance(module, nn.ConvNormReLU) else [module])

        def leave(self, *modules: nn.Module) -> None:
            pass

    token = observer.set(Order())
    try:
        with no_grad():
            model(Tensor(zeros(2, *native(model))))
    finally:
        observer.reset(token)
    holders = [
        module for _, module in model.named_modules() if any(isinstance(v, Tensor) for v in vars(module).values())
    ]
    with_weights = [module for module in ran if module in holders]
    assert len(with_weights) == len(holders)
    assert all(a is b for a, b in zip(with_weights, holders, strict=True))


# ---- Sizes ----


@pytest.mark.parametrize(("name", "heads"), COUNTS)
def test_output_shapes(name: str, heads: bool) -> None:
    """At the native size and, where there is one, at the least; heads answer in training only."""
    model = create_model(name, aux_logits=heads, num_classes=7)
    size = model.form.size
    for pixels in {size.native, size.least or size.native}:
        x = Tensor(zeros(2, 3, pixels, pixels))
        with no_grad():
            assert model.eval()(x).shape == (2, 7)
            if pixels < size.least_with_heads and heads:
                with pytest.raises(
                    ShapeError, match=f"^{name} with auxiliary heads trains on pictures from 299×299 up"
                ):
                    model.train()(x)
                continue
            output = model.train()(x)
        if heads:
            assert output._fields == (*model.form.heads.values(), "logits")
        assert [logits.shape for logits in (output if heads else [output])] == [(2, 7)] * (
            len(model.form.heads) * heads + 1
        )


@pytest.mark.parametrize("name", list_models())
def test_one_pixel_too_few(name: str) -> None:
    """It is refused in a sentence that names the model and both sizes."""
    model = create_model(name, aux_logits=False)
    size, least = model.form.size, model.form.size.least
    if least is None:
        side, message = size.native - 1, "takes 224×224 pictures only, got 223×223: resize them"
    else:
        side, message = least - 1, f"takes pictures from {least}×{least} up, got {least - 1}×{least - 1}: enlarge them"
    with pytest.raises(ShapeError, match=f"^{name} {message}$"):
        model(Tensor(zeros(2, 3, side, side)))


@pytest.mark.parametrize("name", ["bn_inception", "inception_v2"])
def test_modules_of_stride_2_want_even_grids(name: str) -> None:
    """Their padded convolutions and unpadded pools would differ by a row, which the join would say less clearly."""
    with pytest.raises(ShapeError, match=f"^{name} takes pictures of sides 32·n, got 224×240: resize or crop them$"):
        create_model(name)(Tensor(zeros(2, 3, 224, 240)))
    with no_grad():
        assert create_model(name)(Tensor(zeros(2, 3, 64, 96))).shape == (2, 1000)


@pytest.mark.parametrize(
    "name",
    ["googlenet_naive", "bn_inception", "inception_v2", "inception_resnet_v1", "inception_resnet_v2_paper"],
)
def test_networks_without_heads_say_so(name: str) -> None:
    with pytest.raises(MinigradError, match=f"^{name} has no auxiliary heads: leave out aux_logits=True"):
        create_model(name, aux_logits=True)


# ---- Side by side ----


def test_compare() -> None:
    lines = {line.name: line for line in compare()}
    assert list(lines) == list_models()
    for (name, heads), (parameters, _, multiply_adds) in COUNTS.items():
        line = lines[name]
        assert line.about == describe_model(name)
        assert line.size == create_model(name).form.size.native
        assert line.saved_bytes > 0
        if not heads:
            assert (line.parameters, line.multiply_adds) == (parameters, multiply_adds or line.multiply_adds)
        elif line.head_parameters:
            assert line.parameters + line.head_parameters == parameters
    assert {name for name, line in lines.items() if line.head_parameters} == {
        name for name in lines if create_model(name).aux_logits
    }
    assert [line.name for line in compare("inception_v3")] == ["inception_v3"]


def test_every_description_names_its_paper() -> None:
    papers = {"googlenet": "1409.4842", "bn_inception": "1502.03167", "inception_v2": "1502.03167"}
    papers |= {"inception_v3": "1512.00567", "inception_v4": "1602.07261", "inception_resnet": "1602.07261"}
    for name in list_models():
        (paper,) = {paper for prefix, paper in papers.items() if name.startswith(prefix)}
        assert f"arXiv:{paper}" in describe_model(name)
        assert len(describe_model(name)) < 120


def test_table_1_beside_ours() -> None:
    """Which rows of the paper add up, and to what the others come."""
    lines = {line.name: line for line in table_1_beside_ours()}
    assert {name: (line.weights, round(line.multiply_adds / 1e6, 1)) for name, line in lines.items()} == {
        "conv1": (9_408, 118.0),
        "conv2": (114_688, 359.7),
        "3a": (163_328, 128.0),
        "3b": (388_096, 304.3),
        "4a": (375_552, 73.6),
        "4b": (448_512, 87.9),
        "4c": (509_440, 99.9),
        "4d": (604_672, 118.5),
        "4e": (867_328, 170.0),
        "5a": (1_042_432, 51.1),
        "5b": (1_442_816, 70.7),
        "linear": (1_024_000, 1.0),
    }
    agree = {name: (line.parameters_agree, line.operations_agree) for name, line in lines.items()}
    assert [name for name, both in agree.items() if both == (True, True)] == ["conv2", "3a", "3b", "4b", "linear"]
    assert [name for name, both in agree.items() if both == (False, True)] == ["4a", "4c", "4d", "4e", "5b"]
    assert [name for name, both in agree.items() if both == (False, False)] == ["conv1", "5a"]
    assert all(bool(line.remark) != line.parameters_agree for line in lines.values())
    assert "separable" in lines["conv1"].remark
