"""What PyTorch computes, where it is installed: an oracle written by other people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plain_loops
import pytest

from inception.models import InceptionBlock
from minigrad import Tensor, nn, ops, optim
from minigrad.kernels import textbook
from minigrad.layout import Window
from minigrad.random import Key, integers, normal

torch = pytest.importorskip("torch")
F = torch.nn.functional


def data(name: str, *shape: int) -> np.ndarray:
    return normal(Key(0).fold(name, *shape), shape)


def tensors(*arrays: np.ndarray) -> list[Any]:
    """The arrays as float64 leaves that want gradients."""
    return [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]


def assert_close(actual: Any, wanted: Any) -> None:
    np.testing.assert_allclose(actual, wanted.detach().numpy(), rtol=1e-9, atol=1e-9)


# ---- kernels, in float64: the plain loops, which all kernels are proved against, and the textbook ----


@pytest.fixture(params=[plain_loops, textbook], ids=["plain loops", "textbook"])
def k(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("padding", [0, 1, (2, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_conv2d_kernels(k: Any, kernel: tuple[int, int], stride: Any, padding: Any) -> None:
    x, weight, bias = data("x", 2, 3, 7, 8), data("weight", 4, 3, *kernel), data("bias", 4)
    window = Window.of((7, 8), kernel, stride, padding)
    tx, tweight, tbias = tensors(x, weight, bias)
    ty = F.conv2d(tx, tweight, tbias, stride, padding)
    assert_close(k.conv2d(x, weight, bias, window), ty)
    assert_close(k.conv2d(x, weight, None, window), ty - tbias[:, None, None])

    dy = data("dy", *ty.shape)
    ty.backward(torch.tensor(dy))
    assert_close(k.conv2d_dx(dy, weight, window), tx.grad)
    dw, db = k.conv2d_dw(dy, x, window, True)
    assert_close(dw, tweight.grad)
    assert_close(db, tbias.grad)


POOLS = [
    pytest.param(kernel, stride, padding, ceil_mode, id=f"{kernel}/{stride}p{padding}{'ceil' * ceil_mode}")
    for kernel, stride, padding in (
        (3, 2, 0),
        (3, 2, 1),
        (2, 2, 0),
        (2, 3, 1),
        (5, 3, 2),
        (3, 1, 1),
        ((2, 3), (3, 2), (1, 0)),
    )
    for ceil_mode in (False, True)
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), POOLS)
@pytest.mark.parametrize("values", ["normal", "ties", "negative"])
def test_max_pool_kernels(k: Any, values: str, kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> None:
    for size in ((7, 8), (6, 9)):
        x = data("x", 2, 3, *size)
        x = {"normal": x, "ties": np.maximum(np.round(x), 0), "negative": -1 - np.abs(x)}[values]
        window = Window.of(size, kernel, stride, padding, ceil_mode=ceil_mode)
        (tx,) = tensors(x)
        ty = F.max_pool2d(tx, kernel, stride, padding, ceil_mode=ceil_mode)
        y = k.max_pool(x, window)
        assert_close(y, ty)
        dy = data("dy", *ty.shape)
        ty.backward(torch.tensor(dy))
        _, winners = k.max_pool_winners(x, window)
        assert_close(k.max_pool_dx(dy, winners, window), tx.grad)


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), POOLS)
@pytest.mark.parametrize("count_padding", [True, False], ids=["incl.pad", "excl.pad"])
def test_avg_pool_kernels(k: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_padding: bool) -> None:
    for size in ((7, 8), (6, 9)):
        x = data("x", 2, 3, *size)
        window = Window.of(size, kernel, stride, padding, ceil_mode=ceil_mode)
        (tx,) = tensors(x)
        ty = F.avg_pool2d(tx, kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_padding)
        assert_close(k.avg_pool(x, window, count_padding), ty)
        dy = data("dy", *ty.shape)
        ty.backward(torch.tensor(dy))
        assert_close(k.avg_pool_dx(dy, window, count_padding), tx.grad)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_kernels(k: Any, training: bool, relu: bool) -> None:
    x, gamma, beta = data("x", 4, 3, 5, 6) * 2 + 1, data("gamma", 3), data("beta", 3)
    mean, var = k.statistics(x) if training else (data("mean", 3), np.abs(data("var", 3)))
    tx, tgamma, tbeta = tensors(x, gamma, beta)
    running_mean, running_var = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    if not training:
        running_mean, running_var = torch.tensor(mean), torch.tensor(var)
    ty = F.batch_norm(tx, running_mean, running_var, tgamma, tbeta, training, momentum=1.0, eps=1e-3)
    ty = F.relu(ty) if relu else ty
    assert_close(k.batch_norm(x, mean, var, gamma, beta, 1e-3, relu), ty)
    if training:  # with momentum 1 torch hands out the batch's own mean, and its unbiased variance
        pixels = x.size / 3
        assert_close(mean, running_mean)
        assert_close(var * pixels / (pixels - 1), running_var)

    dy = data("dy", *x.shape)
    ty.backward(torch.tensor(dy))
    dx, dgamma, dbeta = k.batch_norm_dx(dy, x, mean, var, gamma, beta, 1e-3, relu, training)
    assert_close(dx, tx.grad)
    assert_close(dgamma, tgamma.grad)
    assert_close(dbeta, tbeta.grad)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11])
def test_lrn_kernels(k: Any, size: int) -> None:
    x, dy = data("x", 2, 7, 3, 4), data("dy", 2, 7, 3, 4)
    (tx,) = tensors(x)
    ty = F.local_response_norm(tx, size, alpha=0.9, beta=0.75, k=2.0)
    assert_close(k.lrn(x, size, 0.9, 0.75, 2.0), ty)
    ty.backward(torch.tensor(dy))
    assert_close(k.lrn_dx(dy, x, size, 0.9, 0.75, 2.0), tx.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("scale", [1, 1000])
def test_cross_entropy_kernels(k: Any, scale: float, smoothing: float) -> None:
    logits, labels = data("logits", 6, 10) * scale, integers(Key(1), 10, 6)
    (tlogits,) = tensors(logits)
    tlosses = F.cross_entropy(tlogits, torch.tensor(labels), reduction="none", label_smoothing=smoothing)
    losses, dlogits = k.cross_entropy(logits, labels, smoothing)
    assert_close(losses, tlosses)
    tlosses.sum().backward()
    assert_close(dlogits, tlogits.grad)


# ---- ops: forward and backward in float64 ----

LABELS = integers(Key(1), 7, 5)
IMAGES = (2, 3, 7, 8)

# name -> (ours, theirs, shapes of the inputs)
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], list[tuple[int, ...]]]] = {
    "conv2d": (
        lambda *t: ops.conv2d(*t, stride=2, padding=1),
        lambda *t: F.conv2d(*t, stride=2, padding=1),
        [IMAGES, (4, 3, 3, 3), (4,)],
    ),
    "conv2d 1×1": (ops.conv2d, F.conv2d, [IMAGES, (4, 3, 1, 1)]),
    "conv2d 1×7": (
        lambda *t: ops.conv2d(*t, padding=(0, 3)),
        lambda *t: F.conv2d(*t, padding=(0, 3)),
        [IMAGES, (4, 3, 1, 7)],
    ),
    "conv2d 5×5": (
        lambda *t: ops.conv2d(*t, padding=2),
        lambda *t: F.conv2d(*t, padding=2),
        [IMAGES, (4, 3, 5, 5), (4,)],
    ),
    "conv2d, depthwise": (
        lambda *t: ops.conv2d(*t, stride=2, padding=3, groups=3),
        lambda *t: F.conv2d(*t, stride=2, padding=3, groups=3),
        [IMAGES, (6, 1, 7, 7), (6,)],
    ),
    "linear": (ops.linear, F.linear, [(5, 6), (4, 6), (4,)]),
    "max_pool2d": (
        lambda x: ops.max_pool2d(x, 3, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        [IMAGES],
    ),
    "max_pool2d, padded": (lambda x: ops.max_pool2d(x, 3, 1, 1), lambda x: F.max_pool2d(x, 3, 1, 1), [IMAGES]),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1), [IMAGES]),
    "avg_pool2d, inner cells": (
        lambda x: ops.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_padding=False),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        [IMAGES],
    ),
    "adaptive_avg_pool2d": (
        lambda x: ops.adaptive_avg_pool2d(x, (4, 3)),
        lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
        [IMAGES],
    ),
    "global_avg_pool2d": (ops.global_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, 1), [IMAGES]),
    "local_response_norm": (
        lambda x: ops.local_response_norm(x, 5, alpha=0.5),
        lambda x: F.local_response_norm(x, 5, alpha=0.5),
        [(2, 7, 3, 4)],
    ),
    "relu": (ops.relu, F.relu, [IMAGES]),
    "softmax": (ops.softmax, lambda x: F.softmax(x, -1), [(5, 7)]),
    "log_softmax": (ops.log_softmax, lambda x: F.log_softmax(x, -1), [(5, 7)]),
    "concat": (lambda *t: ops.concat(t), lambda *t: torch.cat(t, 1), [(2, 3, 4, 5), (2, 1, 4, 5)]),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, LABELS),
        lambda x: F.cross_entropy(x, torch.tensor(LABELS)),
        [(5, 7)],
    ),
    "cross_entropy, smoothed": (
        lambda x: ops.cross_entropy(x, LABELS, label_smoothing=0.1),
        lambda x: F.cross_entropy(x, torch.tensor(LABELS), label_smoothing=0.1),
        [(5, 7)],
    ),
    "mean over two axes": (lambda x: x.mean((0, 2)), lambda x: x.mean((0, 2)), [IMAGES]),
    "arithmetic": (lambda x, y: (x / y - y) * x.exp(), lambda x, y: (x / y - y) * x.exp(), [(4, 3), (3,)]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.usefixtures("host_kernels")
def test_ops(name: str) -> None:
    """Values, and gradients for a random upstream gradient."""
    ours, theirs, shapes = OPS[name]
    arrays = [data(f"{name} {i}", *shape) for i, shape in enumerate(shapes)]
    inputs, tinputs = [Tensor(a, requires_grad=True) for a in arrays], tensors(*arrays)
    y, ty = ours(*inputs), theirs(*tinputs)
    assert_close(y.data, ty)
    upstream = data("upstream", *y.shape)
    y.backward(upstream)
    ty.backward(torch.tensor(upstream))
    for x, tx in zip(inputs, tinputs, strict=True):
        assert_close(x.grad, tx.grad)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("host_kernels")
def test_batch_norm(training: bool) -> None:
    """Values, gradients, and the running statistics afterwards."""
    x, gamma, beta = data("x", 3, 4, 5, 6), data("gamma", 4), data("beta", 4)
    mean, var = data("mean", 4), data("var", 4) ** 2 + 0.1
    tmean, tvar = torch.tensor(mean), torch.tensor(var)
    inputs, tinputs = [Tensor(a, requires_grad=True) for a in (x, gamma, beta)], tensors(x, gamma, beta)
    y = ops.batch_norm(*inputs, mean, var, training=training, momentum=0.3, eps=1e-3, relu=True)
    ty = F.relu(F.batch_norm(tinputs[0], tmean, tvar, *tinputs[1:], training, momentum=0.3, eps=1e-3))
    assert_close(y.data, ty)
    assert_close(mean, tmean)
    assert_close(var, tvar)
    upstream = data("upstream", *y.shape)
    y.backward(upstream)
    ty.backward(torch.tensor(upstream))
    for mine, theirs in zip(inputs, tinputs, strict=True):
        assert_close(mine.grad, theirs.grad)


# ---- A network: an Inception block and a classifier, built from torch's own layers ----


def torch_unit(in_channels: int, out_channels: int, kernel: int) -> Any:
    conv = torch.nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(out_channels), torch.nn.ReLU())


class TorchNet(torch.nn.Module):
    """Written from the article's figure, not from our code."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch_unit(3, 4, 1)
        self.three = torch.nn.Sequential(torch_unit(3, 3, 1), torch_unit(3, 5, 3))
        self.five = torch.nn.Sequential(torch_unit(3, 2, 1), torch_unit(2, 3, 5))
        self.pool = torch.nn.Sequential(torch.nn.MaxPool2d(3, 1, 1), torch_unit(3, 2, 1))
        self.classifier = torch.nn.Linear(14, 6)

    def forward(self, x: Any) -> Any:
        branches = [self.one, self.three, self.five, self.pool]
        return self.classifier(torch.cat([branch(x) for branch in branches], 1).mean((2, 3)))


@pytest.mark.usefixtures("host_kernels")
def test_training_steps_of_an_inception_network() -> None:
    """Two steps of SGD from the same weights: loss, all gradients, running statistics, updated parameters."""
    torch.manual_seed(0)
    theirs = TorchNet().double()
    ours = nn.Sequential(
        InceptionBlock(3, 4, 3, 5, 2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, 6)
    ).astype("float64")
    # Both list a layer's state in the order weight, bias, running mean, running variance, layer after layer.
    state = [v.numpy() for name, v in theirs.state_dict().items() if not name.endswith("num_batches_tracked")]
    ours.load_state_dict(dict(zip(ours.state_dict(), state, strict=True)))
    optimizer = optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    toptimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    x, labels = data("pictures", 4, 3, 9, 8), integers(Key(2), 6, 4)
    for _ in range(2):
        loss = ops.cross_entropy(ours(Tensor(x)), labels)
        tloss = F.cross_entropy(theirs(torch.tensor(x)), torch.tensor(labels))
        assert_close(loss.data, tloss)
        optimizer.zero_grad()
        toptimizer.zero_grad()
        loss.backward()
        tloss.backward()
        for p, tp in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(p.grad, tp.grad)
        optimizer.step()
        toptimizer.step()
    tstate = [v for name, v in theirs.state_dict().items() if not name.endswith("num_batches_tracked")]
    for value, tvalue in zip(ours.state_dict().values(), tstate, strict=True):
        assert_close(value, tvalue)
    assert_close(ours.eval()(Tensor(x)).data, theirs.eval()(torch.tensor(x)))
