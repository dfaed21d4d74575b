"""The family beside networks of PyTorch's own layers, built from the published tables (`published.md`), not from ours.

In float64, at an eighth or a sixteenth of the width: logits in training and evaluation, gradients of all parameters,
running statistics. Parameters are matched by order alone (networks list them in the order in which they run).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest
from published import rows

from inception.models import create_model
from minigrad import Tensor, nn, no_grad
from minigrad.random import Key, normal, uniform

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
T, F = torch.nn, torch.nn.functional


class Published(NamedTuple):
    """What the implementations have beside the tables."""

    rows: str  # the table
    size: int  # to compare at
    bias: bool = False  # of convolutions in units
    eps: float | None = 1e-3  # of batch norm; None: there is none
    heads: tuple[int, ...] = ()  # indices of the rows they look at
    head: str = ""
    average: int | None = None  # kernel of the last pool; None: all pixels
    embedding: int = 0
    width: int = 8  # published widths are divided by it


# Heads of v1 look at 4a and 4d; of v3, v4 and Inception-ResNet-v2 at the last row of 17×17.
NETWORKS = {
    "googlenet": Published("googlenet", 224, bias=True, eps=1e-5, heads=(7, 10), head="5/3", average=7),
    "googlenet_paper": Published("googlenet_paper", 224, bias=True, eps=None, heads=(10, 13), head="5/3", average=7),
    "googlenet_torchvision": Published("googlenet_torchvision", 96, heads=(8, 11), head="4×4"),
    "bn_inception": Published("bn_inception", 96, bias=True, eps=1e-5, width=16),
    "inception_v2": Published("inception_v2", 96, width=16),
    "inception_v3": Published("inception_v3", 299, heads=(14,), head="v3", width=16),
    "inception_v4": Published("inception_v4", 139, width=16),
    "inception_v4 with its head": Published("inception_v4", 299, heads=(17,), head="v3", width=16),
    "inception_resnet_v1": Published("inception_resnet_v1", 139, width=16),
    "inception_resnet_v1_facenet": Published("inception_resnet_v1", 139, embedding=512, width=16),
    "inception_resnet_v2": Published("inception_resnet_v2", 139, width=16),
    "inception_resnet_v2 with its head": Published("inception_resnet_v2", 299, heads=(38,), head="v3", width=16),
    "inception_resnet_v2_paper": Published("inception_resnet_v2_paper", 139, width=16),
    "googlenet_cifar": Published("googlenet_cifar", 32, bias=True, eps=1e-5),
}
SLOW = ["inception_v4 with its head", "inception_resnet_v2 with its head"]


def unit(of: Published, i: int, o: int, kernel: Any, stride: int = 1, padding: Any = 0) -> Any:
    layers = [T.Conv2d(i, o, kernel, stride, padding, bias=of.bias)]
    return T.Sequential(*layers, *([T.BatchNorm2d(o, of.eps)] if of.eps else []), T.ReLU())


def layer(of: Published, text: str, i: int) -> tuple[Any, int]:
    """One layer of a figure with i channels in, and its channels out."""
    if found := re.fullmatch(r"(\d)×(\d)(?:/(\d))?(?: p(\d)| p\((\d),(\d)\))? → (\d+)", text):
        kh, kw, stride, p, ph, pw, o = (int(g or 0) for g in found.groups())
        return unit(of, i, o // of.width, (kh, kw), stride or 1, (ph or p, pw or p)), o // of.width
    if found := re.fullmatch(r"(max|avg) (\d)×\d/(\d)(?: p(\d))?( ceil)?(?: (in|ex)cl.pad)?", text):
        kind, *numbers, ceil, counts = found.groups()
        kernel, stride, padding = (int(n or 0) for n in numbers)
        if kind == "max":
            return T.MaxPool2d(kernel, stride, padding, ceil_mode=bool(ceil)), i
        return T.AvgPool2d(kernel, stride, padding, bool(ceil), count_include_pad=counts == "in"), i
    if found := re.fullmatch(r"depthwise (\d)×\d/(\d) p(\d), multiplier (\d) → 24 \(no bias, no BN, no ReLU\)", text):
        kernel, stride, padding, multiplier = map(int, found.groups())
        return T.Conv2d(i, i * multiplier, kernel, stride, padding, groups=i, bias=False), i * multiplier
    if text == "LRN(size 5, α 0.0001, β 0.75, k 1)":
        return T.LocalResponseNorm(5, 0.0001, 0.75, 1), i
    assert (text[:2], text[-2:]) == ("[ ", " ]"), text
    return side_by_side(of, text[2:-2].split(" ‖ "), i)


def chain(of: Published, text: str, i: int) -> tuple[Any, int]:
    layers = []
    for part in text.split(" ⟶ "):
        module, i = layer(of, part, i)
        layers.append(module)
    return T.Sequential(*layers), i


class SideBySide(T.ModuleList):
    def forward(self, x: Any) -> Any:
        return torch.cat([branch(x) for branch in self], 1)


def side_by_side(of: Published, texts: list[str], i: int) -> tuple[Any, int]:
    built = [chain(of, text, i) for text in texts]
    return SideBySide([module for module, _ in built]), sum(o for _, o in built)


class Shortcut(T.Module):
    def __init__(self, branches: Any, width: int, i: int, scale: float, relu: bool):
        super().__init__()
        self.branches, self.up = branches, T.Conv2d(width, i, 1)
        self.scale, self.relu = scale, relu

    def forward(self, x: Any) -> Any:
        y = x + self.scale * self.up(self.branches(x))
        return torch.relu(y) if self.relu else y


def module(of: Published, figure: str, i: int) -> tuple[Any, int]:
    """A row of a table."""
    if "<br>" not in figure:
        return chain(of, figure, i)
    branches = figure.split("<br>")
    end = branches.pop() if branches[-1].startswith("concat") else ""
    built, o = side_by_side(of, [text.partition(": ")[2] for text in branches], i)
    if not end:
        return built, o
    found = re.fullmatch(r"concat ⟶ 1×1 → (\d+) with bias, no BN ⟶ ×([\d.]+) ⟶ \+ input( ⟶ ReLU| \(no ReLU\))", end)
    assert found
    assert int(found[1]) // of.width == i
    return Shortcut(built, o, i, float(found[2]), "⟶" in found[3]), i


def head(of: Published, i: int, classes: int) -> Any:
    if of.head == "v3":
        units = [unit(of, i, 128 // of.width, 1), unit(of, 128 // of.width, 768 // of.width, 5)]
        return T.Sequential(T.AvgPool2d(5, 3), *units, T.Flatten(), T.Linear(768 // of.width, classes))
    pool = T.AvgPool2d(5, 3) if of.head == "5/3" else T.AdaptiveAvgPool2d(4)
    hidden = [T.Flatten(), T.Linear(2048 // of.width, 1024 // of.width), T.ReLU()]
    return T.Sequential(pool, unit(of, i, 128 // of.width, 1), *hidden, T.Linear(1024 // of.width, classes))


class Network(T.Module):
    """All logits in the order in which they are computed, in evaluation the classifier's alone."""

    def __init__(self, of: Published, classes: int):
        super().__init__()
        self.layers, self.heads, i = T.ModuleList(), set(), 3
        table = [row.figure for row in rows(of.rows)]
        if of.embedding:  # facenet: the last module once more, with s = 1 and no ReLU
            table.append(table[-1].replace("×0.2 ⟶ + input ⟶ ReLU", "×1 ⟶ + input (no ReLU)"))
        for k, figure in enumerate(table):
            built, i = module(of, figure, i)
            self.layers.append(built)
            if k in of.heads:
                self.heads.add(len(self.layers))
                self.layers.append(head(of, i, classes))
        end: list[Any] = [T.AvgPool2d(of.average) if of.average else T.AdaptiveAvgPool2d(1), T.Flatten()]
        if of.embedding:
            end += [T.Linear(i, of.embedding, bias=False), T.BatchNorm1d(of.embedding, of.eps)]
            i = of.embedding
        self.layers.append(T.Sequential(*end, T.Linear(i, classes)))

    def forward(self, x: Any) -> list[Any]:
        answers = []
        for k, built in enumerate(self.layers):
            if k not in self.heads:
                x = built(x)
            elif self.training:
                answers.append(built(x))
        return [*answers, x]


def shaken(model: nn.Module) -> nn.Module:
    """Everything that starts at zero or one moved off it, as training does, so that nothing cancels."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1:
            tensor.data += 0.2 * uniform(Key(3).fold(name), tensor.shape)
    for _, part in model.named_modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # its masks are no matter of this test
    return model


def assert_near(actual: Any, wanted: Any, tolerance: float, name: str = "") -> None:
    wanted = wanted.detach().numpy()
    scale = max(np.abs(wanted).max(), 1e-3)
    assert np.abs(actual.reshape(wanted.shape) - wanted).max() <= tolerance * scale, name


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETWORKS])
def test_networks(name: str) -> None:
    of = NETWORKS[name]
    ours = create_model(name.partition(" ")[0], width=1 / of.width, num_classes=6, aux_logits=bool(of.heads) or None)
    ours = shaken(ours.astype("float64"))
    torch.manual_seed(0)
    theirs = Network(of, 6).double()
    parameters, tparameters = list(ours.parameters()), list(theirs.parameters())
    state, tstate = [t for _, t in ours.named_buffers()], [t for t in theirs.buffers() if t.ndim]
    with torch.no_grad():
        for mine, other in zip([*parameters, *state], [*tparameters, *tstate], strict=True):
            assert mine.shape == tuple(other.shape)
            other.copy_(torch.tensor(np.ascontiguousarray(mine.data)))

    x = normal(Key(1).fold(name), (3, 3, of.size, of.size))
    outputs, toutputs = ours(Tensor(x)), theirs(torch.tensor(x))
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss, tloss = Tensor(np.zeros(())), 0
    for k, (y, ty) in enumerate(zip(outputs, toutputs, strict=True)):
        assert_near(y.data, ty, 1e-9, f"logits {k}")
        upstream = normal(Key(2).fold(k), y.shape)
        loss, tloss = loss + (y * Tensor(upstream)).sum(), tloss + (ty * torch.tensor(upstream)).sum()
    loss.backward()
    tloss.backward()
    for (path, mine), other in zip(ours.named_parameters(), tparameters, strict=True):
        assert_near(mine.grad, other.grad, 1e-6, path)
    for (path, mine), other in zip(ours.named_buffers(), tstate, strict=True):
        assert_near(mine.data, other, 1e-9, path)
    with no_grad():
        assert_near(ours.eval()(Tensor(x)).data, theirs.eval()(torch.tensor(x))[-1], 1e-9, "in evaluation")
