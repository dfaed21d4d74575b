"""Batch norm and local response normalisation: meanings, and every sentence they refuse with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from leaves import Make, host

from minigrad import Tensor, nn, ops
from minigrad.backend import to_host
from minigrad.errors import BackendError, DtypeError, ShapeError
from minigrad.random import Key, normal


def normalised(xp: Any, x: Tensor, running: tuple[Any, Any], **options: Any) -> Tensor:
    c = x.shape[1]
    gamma, beta = Tensor(xp.ones(c, x.dtype)), Tensor(xp.zeros(c, x.dtype))
    return ops.batch_norm(x, gamma, beta, *running, **options)


def test_batch_norm_gives_mean_0_and_variance_1(xp: Any, make: Make) -> None:
    y = normalised(xp, make(4, 3, 5, 5), (xp.zeros(3), xp.ones(3)), training=True, eps=0.0).numpy()
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-14)
    np.testing.assert_allclose(y.var((0, 2, 3)), 1, rtol=1e-12)


def test_running_statistics_move_towards_the_batchs(xp: Any, make: Make) -> None:
    """By `momentum`, in place, and with the unbiased variance: n − 1, not n."""
    x = make(2, 3, 3, 3)
    mean, var = xp.full(3, 2.0), xp.full(3, 5.0)
    normalised(xp, x, (mean, var), training=True, momentum=0.3)
    batch_mean, batch_var = x.numpy().mean((0, 2, 3)), x.numpy().var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(to_host(mean), 0.7 * 2 + 0.3 * batch_mean, rtol=1e-12)
    np.testing.assert_allclose(to_host(var), 0.7 * 5 + 0.3 * batch_var, rtol=1e-12)


def test_evaluation_uses_the_running_statistics_and_leaves_them(xp: Any, make: Make) -> None:
    x, mean, var = make(2, 3, 3, 3), xp.full(3, 2.0), xp.full(3, 5.0)
    y = normalised(xp, x, (mean, var), training=False, eps=1e-3)
    np.testing.assert_allclose(y.numpy(), (x.numpy() - 2) / np.sqrt(5 + 1e-3), rtol=1e-12)
    assert to_host(mean).tolist() == [2.0] * 3
    assert to_host(var).tolist() == [5.0] * 3


def test_an_image_alone_is_evaluated_as_in_its_batch() -> None:
    """With batch statistics in evaluation, a prediction would depend on the other pictures."""
    x, running = host(4, 3, 5, 5), (np.zeros(3), np.ones(3))
    together = normalised(np, x, running, training=False).data[:1]
    np.testing.assert_array_equal(normalised(np, Tensor(x.data[:1]), running, training=False).data, together)


def test_backward_of_batch_norm_uses_the_statistics_of_its_forward_pass() -> None:
    """The running arrays change in place, for example in the next training step, before backward runs."""
    grads = []
    for disturb in (False, True):
        x, mean, var = host(2, 3, 3, 3), np.full(3, 0.5), np.full(3, 2.0)
        y = normalised(np, x, (mean, var), training=False)
        if disturb:
            mean += 1
            var *= 10
        y.backward(normal(Key(0), y.shape))
        grads.append(x.grad)
    np.testing.assert_array_equal(*grads)


def test_running_statistics_stay_float32() -> None:
    """Batch statistics are computed in float64: they must not turn the state into it."""
    mean, var = np.zeros(3, "float32"), np.ones(3, "float32")
    normalised(np, Tensor(host(2, 3, 3, 3).data.astype("float32")), (mean, var), training=True)
    assert mean.dtype == var.dtype == np.float32
    assert mean.any()


def test_fused_relu_is_batch_norm_then_relu(xp: Any, make: Make) -> None:
    """Values, gradients and running statistics."""
    results = []
    for fused in (True, False):
        inputs = [make(4, 3, 3, 5), make(3, name="gamma"), make(3, name="beta")]
        running = xp.zeros(3), xp.ones(3)
        y = ops.batch_norm(*inputs, *running, training=True, relu=fused)
        y = y if fused else ops.relu(y)
        y.backward(make(4, 3, 3, 5, name="dy").data)
        results.append([to_host(a) for a in (y.data, *running, *(t.grad for t in inputs))])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1)], ids=str)
def test_one_value_per_channel_is_refused_in_training(shape: Any) -> None:
    """Its variance is zero, and the unbiased one divides by zero: the running variance would be NaN for ever."""
    running = np.zeros(3), np.ones(3)
    with pytest.raises(ShapeError, match=r"more than one value per channel, got input \(1, 3, 1, 1\): use a batch of"):
        normalised(np, host(*shape), running, training=True)
    assert running[1].tolist() == [1.0] * 3
    normalised(np, host(*shape), running, training=False)


def test_batch_norm_says_what_does_not_fit() -> None:
    x = host(2, 3, 4, 4)
    with pytest.raises(ShapeError, match=r"input of shape \(2, 3, 4, 4\), gamma \(4,\) wants \(N, 4, H, W\)"):
        ops.batch_norm(x, host(4), host(4), np.zeros(4), np.ones(4), training=True)
    with pytest.raises(ShapeError, match="batch_norm got"):
        ops.batch_norm(x, host(3), host(3), np.zeros(1), np.ones(1), training=True)
    with pytest.raises(ShapeError, match=r"batch_norm got an empty input \(0, 3, 4, 4\)"):
        ops.batch_norm(host(0, 3, 4, 4), host(3), host(3), np.zeros(3), np.ones(3), training=False)


def test_running_statistics_that_cannot_move_are_refused() -> None:
    """A tensor would be replaced by its new value, not changed, and evaluation would use the old one."""
    x, affine = host(2, 3, 4, 4), (host(3), host(3))
    with pytest.raises(BackendError, match="Tensor where a NumPy or CuPy array is wanted"):
        ops.batch_norm(x, *affine, Tensor(np.zeros(3)), Tensor(np.ones(3)), training=True)
    with pytest.raises(DtypeError, match="batch_norm keeps its running statistics as floats, got int64"):
        ops.batch_norm(x, *affine, np.zeros(3, int), np.ones(3, int), training=True)


def test_local_response_norm_of_one_pixel() -> None:
    """alpha is divided by size, as in Caffe and PyTorch, and the sum is clipped at the ends."""
    x = Tensor(np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1))
    y = ops.local_response_norm(x, 3, alpha=0.3, beta=0.5, k=2.0)
    sums = np.array([1 + 4, 1 + 4 + 9, 4 + 9])
    np.testing.assert_allclose(y.data.ravel(), [1, 2, 3] / np.sqrt(2 + 0.1 * sums))


def test_local_response_norm_says_what_it_takes() -> None:
    with pytest.raises(ShapeError, match="size of at least 1"):
        ops.local_response_norm(host(1, 3, 2, 2), 0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_of_large_numbers_is_right_or_not_finite(training: bool) -> None:
    """1e20 ± 1e19, whose squares are no float32; by NumPy in float64."""
    x = (1e20 + 1e19 * normal(Key(0), (4, 2, 3, 3))).astype("float32")
    layer = nn.BatchNorm2d(2)
    layer.momentum = 1.0
    y = layer(Tensor(x)).data
    wide = x.astype("float64")
    mean, std = wide.mean((0, 2, 3), keepdims=True), wide.std((0, 2, 3), keepdims=True)
    if not training:
        y, std = layer.eval()(Tensor(x)).data, wide.std((0, 2, 3), keepdims=True, ddof=1)
    right = np.abs(y - (wide - mean) / std) < 1e-3
    assert (right | ~np.isfinite(y)).all()
