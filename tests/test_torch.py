"""What PyTorch computes, where it is installed: an oracle written by other people."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minigrad.kernels import reference
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


# ---- kernels: the reference loops, which the fast kernels are proved against, in float64 ----


@pytest.mark.parametrize("padding", [0, 1, (2, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_conv2d_kernels(kernel: tuple[int, int], stride: Any, padding: Any) -> None:
    x, weight, bias = data("x", 2, 3, 7, 8), data("weight", 4, 3, *kernel), data("bias", 4)
    window = Window.of((7, 8), kernel, stride, padding)
    tx, tweight, tbias = tensors(x, weight, bias)
    ty = F.conv2d(tx, tweight, tbias, stride, padding)
    assert_close(reference.conv2d(x, weight, bias, window), ty)
    assert_close(reference.conv2d(x, weight, None, window), ty - tbias[:, None, None])

    dy = data("dy", *ty.shape)
    ty.backward(torch.tensor(dy))
    assert_close(reference.conv2d_dx(dy, weight, window), tx.grad)
    dw, db = reference.conv2d_dw(dy, x, window, True)
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
def test_max_pool_kernels(values: str, kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> None:
    for size in ((7, 8), (6, 9)):
        x = data("x", 2, 3, *size)
        x = {"normal": x, "ties": np.maximum(np.round(x), 0), "negative": -1 - np.abs(x)}[values]
        window = Window.of(size, kernel, stride, padding, ceil_mode=ceil_mode)
        (tx,) = tensors(x)
        ty = F.max_pool2d(tx, kernel, stride, padding, ceil_mode=ceil_mode)
        y = reference.max_pool(x, window)
        assert_close(y, ty)
        dy = data("dy", *ty.shape)
        ty.backward(torch.tensor(dy))
        assert_close(reference.max_pool_dx(dy, x, y, window), tx.grad)


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), POOLS)
@pytest.mark.parametrize("count_padding", [True, False], ids=["incl.pad", "excl.pad"])
def test_avg_pool_kernels(kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_padding: bool) -> None:
    for size in ((7, 8), (6, 9)):
        x = data("x", 2, 3, *size)
        window = Window.of(size, kernel, stride, padding, ceil_mode=ceil_mode)
        (tx,) = tensors(x)
        ty = F.avg_pool2d(tx, kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=count_padding)
        assert_close(reference.avg_pool(x, window, count_padding), ty)
        dy = data("dy", *ty.shape)
        ty.backward(torch.tensor(dy))
        assert_close(reference.avg_pool_dx(dy, window, count_padding), tx.grad)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_kernels(training: bool, relu: bool) -> None:
    x, gamma, beta = data("x", 4, 3, 5, 6) * 2 + 1, data("gamma", 3), data("beta", 3)
    mean, var = reference.statistics(x) if training else (data("mean", 3), np.abs(data("var", 3)))
    tx, tgamma, tbeta = tensors(x, gamma, beta)
    running_mean, running_var = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    if not training:
        running_mean, running_var = torch.tensor(mean), torch.tensor(var)
    ty = F.batch_norm(tx, running_mean, running_var, tgamma, tbeta, training, momentum=1.0, eps=1e-3)
    ty = F.relu(ty) if relu else ty
    assert_close(reference.batch_norm(x, mean, var, gamma, beta, 1e-3, relu), ty)
    if training:  # with momentum 1 torch hands out the batch's own mean, and its unbiased variance
        pixels = x.size / 3
        assert_close(mean, running_mean)
        assert_close(var * pixels / (pixels - 1), running_var)

    dy = data("dy", *x.shape)
    ty.backward(torch.tensor(dy))
    dx, dgamma, dbeta = reference.batch_norm_dx(dy, x, mean, var, gamma, beta, 1e-3, relu, training)
    assert_close(dx, tx.grad)
    assert_close(dgamma, tgamma.grad)
    assert_close(dbeta, tbeta.grad)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11])
def test_lrn_kernels(size: int) -> None:
    x, dy = data("x", 2, 7, 3, 4), data("dy", 2, 7, 3, 4)
    (tx,) = tensors(x)
    ty = F.local_response_norm(tx, size, alpha=0.9, beta=0.75, k=2.0)
    assert_close(reference.lrn(x, size, 0.9, 0.75, 2.0), ty)
    ty.backward(torch.tensor(dy))
    assert_close(reference.lrn_dx(dy, x, size, 0.9, 0.75, 2.0), tx.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("scale", [1, 1000])
def test_cross_entropy_kernels(scale: float, smoothing: float) -> None:
    logits, labels = data("logits", 6, 10) * scale, integers(Key(1), 10, 6)
    (tlogits,) = tensors(logits)
    tlosses = F.cross_entropy(tlogits, torch.tensor(labels), reduction="none", label_smoothing=smoothing)
    losses, dlogits = reference.cross_entropy(logits, labels, smoothing)
    assert_close(losses, tlosses)
    tlosses.sum().backward()
    assert_close(dlogits, tlogits.grad)
