"""ONNX: the graph gives the network's logits, in another program, for any batch; and the command that writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inception.__main__ import main
from inception.export import ExportError, export_onnx
from inception.models import create_model, list_models
from inception.weights import load_model, save_weights
from minigrad import Tensor, nn, no_grad, ops
from minigrad.backend import asarray, to_host
from minigrad.random import Key, normal, uniform

onnx = pytest.importorskip("onnx", reason="writes ONNX, which is not installed")
ort = pytest.importorskip("onnxruntime", reason="runs ONNX, which is not installed")


def settled(model: Any, size: tuple[int, int, int]) -> Any:
    """Like a trained network, in evaluation: no vector is constant, and batch norms know the statistics of a batch.

    Their beta is about 1, which leaves most ReLUs open. With it near 0, as in fresh weights, the deep networks
    multiply rounding by thousands: Inception v4's logits in float32 are then 7e-4 off those in float64.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1:
            tensor.data += asarray(0.2 * uniform(Key(3).fold(name), tensor.shape)).astype(tensor.dtype)
    norms = [module for _, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.beta.data += 1
        norm.momentum = 1.0
    batch = 2 + 2**16 // (size[1] * size[2])  # small pictures end as one pixel each, of which there must be many
    with no_grad():
        model.train()(Tensor(asarray(normal(Key(2), (batch, *size)).astype(np.float32))))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def answers(path: Path, pictures: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pictures": pictures})[0]


def agree(path: Path, model: Any, size: tuple[int, int, int], tolerance: float = 1e-4) -> None:
    """The file is valid, and gives the model's logits for batches of 1 and of 3."""
    onnx.checker.check_model(path, full_check=True)
    for batch in (1, 3):
        x = normal(Key(1).fold(batch), (batch, *size)).astype(np.float32)
        with no_grad():
            wanted = to_host(model(Tensor(asarray(x))).data)
        np.testing.assert_allclose(answers(path, x), wanted, rtol=0, atol=tolerance)
        assert wanted.std() > 0


def least(model: Any) -> int:
    size = model.form.size
    return size.native if size.least is None else max(size.least, size.multiple)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", list_models())
def test_every_network_in_small(tmp_path: Path, name: str, fold: bool) -> None:
    width = 0.25 if name.startswith("googlenet_s") else 0.125
    model = create_model(name, num_classes=5, aux_logits=False, width=width)
    size = (3, least(model), least(model))
    settled(model, size)
    export_onnx(tmp_path / "m.onnx", model, size, {"classes": ["a"]}, fold=fold)
    agree(tmp_path / "m.onnx", model, size)
    written = onnx.load(tmp_path / "m.onnx")
    kinds = [node.op_type for node in written.graph.node]
    units = sum(isinstance(module, nn.ConvNormReLU) for _, module in model.named_modules())
    norms = sum(isinstance(module, nn.BatchNorm2d) for _, module in model.named_modules())
    assert kinds.count("BatchNormalization") == (norms - units if fold else norms)
    assert {p.key: json.loads(p.value) for p in written.metadata_props} == {"inception": {"classes": ["a"]}}


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_network_as_published(tmp_path: Path, name: str) -> None:
    model = create_model(name)
    size = (3, model.form.size.native, model.form.size.native)
    settled(model, size)
    for fold in (True, False):
        export_onnx(tmp_path / "m.onnx", model, size, {}, fold=fold)
        agree(tmp_path / "m.onnx", model, size)


class Odd(nn.Module):
    """One op of each kind that needs care."""

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, count_padding=False, ceil_mode=True),
        nn.AvgPool2d((3, 2), (2, 1), (1, 0)),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1), stride=(2, 1), groups=2),
        nn.LocalResponseNorm(3, alpha=0.5, k=2.0),
        nn.BatchNorm2d(4, relu=True),
    ],
    ids=lambda layer: repr(layer),
)
@pytest.mark.parametrize("size", [(4, 7, 10), (4, 8, 9)])
def test_layers_of_odd_sizes(tmp_path: Path, layer: nn.Module, size: tuple[int, int, int]) -> None:
    model = Odd(layer).eval()
    export_onnx(tmp_path / "m.onnx", model, size, {})
    agree(tmp_path / "m.onnx", model, size, 1e-6)


class Softly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ops.softmax(x.flatten())


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::-1].flatten()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Softly(), "softmax in .model. has no counterpart"),
        (Turned(), "index in .model. does more than reshape"),
        (Odd(nn.AdaptiveAvgPool2d(2)), r"layers\.0: an adaptive pool"),
        (Odd(nn.LocalResponseNorm(4)), r"layers\.0: ONNX centres"),
        (Odd(nn.AvgPool2d(4, 2, 1, ceil_mode=True)), r"layers\.0: a mean in ceil mode"),
    ],
)
def test_what_onnx_has_no_word_for(tmp_path: Path, model: nn.Module, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        export_onnx(tmp_path / "m.onnx", model, (3, 5, 5), {})
    assert not list(tmp_path.iterdir())


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"pip install onnx"):
        export_onnx(tmp_path / "m.onnx", Softly(), (3, 5, 5), {})


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_number_for_each_channel(tmp_path: Path, channels: int) -> None:
    """As many channels as pictures are traced do not make pictures of them."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * Tensor(np.arange(1, channels + 1, dtype=np.float32).reshape(-1, 1, 1))).flatten()

    model = Scaled().eval()
    export_onnx(tmp_path / "m.onnx", model, (channels, 4, 5), {})
    agree(tmp_path / "m.onnx", model, (channels, 4, 5), 1e-6)


def test_a_model_that_recomputes(tmp_path: Path) -> None:
    model = settled(create_model("googlenet_small", num_classes=3), (3, 16, 12))
    model.inception3a.recompute = True
    export_onnx(tmp_path / "m.onnx", model, (3, 16, 12), {})
    agree(tmp_path / "m.onnx", model, (3, 16, 12), 1e-4)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "train()"])
def test_the_model_is_left_as_it_was(tmp_path: Path, called: bool) -> None:
    model = create_model("googlenet_small")
    if called:
        model.train()
    before = model.state_dict()
    export_onnx(tmp_path / "m.onnx", model, (3, 8, 8), {})
    assert model.training
    assert all(np.array_equal(value, before[name]) for name, value in model.state_dict().items())


def test_from_trained_weights_to_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, from a PyTorch file that knows its pictures."""
    model = settled(create_model("googlenet_small", num_classes=3), (3, 16, 12))
    about: dict[str, Any] = {"model": "googlenet_small", "options": {"num_classes": 3}, "classes": ["a", "b", "c"],
                             "mean": [0.5] * 3, "std": [0.25] * 3, "size": [16, 12]}  # fmt: skip
    save_weights(tmp_path / "w.pth", model, about)
    assert main(["export", str(tmp_path / "w.pth"), "--to", str(tmp_path / "m.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "googlenet_small"
    agree(tmp_path / "m.onnx", load_model(tmp_path / "w.pth")[0], (3, 16, 12))
    assert json.loads(onnx.load(tmp_path / "m.onnx").metadata_props[0].value)["classes"] == ["a", "b", "c"]


def test_one_channel_is_described_by_one_number(tmp_path: Path) -> None:
    """Pictures of three are what predict prepares; ONNX may have others."""
    model = settled(create_model("googlenet_small", num_classes=3, in_channels=1), (1, 16, 12))
    about = {"model": "googlenet_small", "options": {"num_classes": 3, "in_channels": 1}, "classes": ["a", "b", "c"],
             "size": [16, 12], "mean": [0.5], "std": [0.5]}  # fmt: skip
    save_weights(tmp_path / "w.npz", model, about)
    assert main(["export", str(tmp_path / "w.npz"), "--to", str(tmp_path / "m.onnx"), "--quiet"]) == 0
    agree(tmp_path / "m.onnx", model, (1, 16, 12), 1e-4)


@pytest.mark.parametrize("fold", [True, False])
def test_nodes_are_named_after_their_layers(tmp_path: Path, fold: bool) -> None:
    """As viewers split them: the path of the layer with slashes, then the op."""
    model = create_model("googlenet_small", num_classes=4)
    export_onnx(tmp_path / "m.onnx", model, (3, 32, 32), {}, fold=fold)
    nodes = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type != "Identity"]
    assert len(set(nodes)) == len(nodes)
    layers = {path.replace(".", "/") for path, _ in model.named_modules()}
    assert {name.rpartition("/")[0] for name in nodes} <= layers
    assert {"conv1/Conv", "inception3a/branch2/0/Relu", "inception3a/Concat", "avgpool/GlobalAveragePool",
            "fc1/Gemm"} <= set(nodes)  # fmt: skip
    assert ("conv1/BatchNormalization" in nodes) is not fold
