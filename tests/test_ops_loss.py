"""The classifier's loss: meanings, and every sentence it refuses with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from leaves import host

from minigrad import Tensor, ops
from minigrad.backend import to_host
from minigrad.errors import BackendError, DtypeError, MinigradError, ShapeError


def test_guessing_costs_ln_k(xp: Any) -> None:
    loss = ops.cross_entropy(Tensor(xp.zeros((4, 10))), xp.asarray([0, 1, 2, 9]))
    assert loss.item() == pytest.approx(math.log(10))


def test_label_smoothing_by_hand() -> None:
    """Two classes, s = 0.2: q = (0.9, 0.1); softmax(ln 3, 0) = (3/4, 1/4)."""
    loss = ops.cross_entropy(Tensor(np.array([[math.log(3), 0.0]])), np.array([0]), label_smoothing=0.2)
    assert loss.item() == pytest.approx(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4))


def test_a_class_that_is_ruled_out_costs_nothing(xp: Any) -> None:
    """A logit of −∞: its probability is 0, and so is its part of the loss, where it is not the label."""
    x = Tensor(xp.asarray([[1.0, 2.0, -np.inf], [0.0, -np.inf, -np.inf]]), requires_grad=True)
    loss = ops.cross_entropy(x, xp.asarray([0, 0]))
    assert loss.item() == pytest.approx(math.log(1 + math.e) / 2)
    loss.backward()
    p = math.e / (1 + math.e)
    np.testing.assert_allclose(to_host(x.grad), [[-p / 2, p / 2, 0], [0, 0, 0]], atol=1e-15)


def test_the_loss_is_a_mean_over_the_batch() -> None:
    """A sum would make the learning rate depend on the batch size."""
    x, labels = host(3, 4), np.array([1, 0, 3])
    each = [ops.cross_entropy(Tensor(x.data[i : i + 1]), labels[i : i + 1]).item() for i in range(3)]
    loss = ops.cross_entropy(x, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(each) / 3)


@pytest.mark.parametrize(("label", "row"), [(4, 0), (-1, 2), (400, 1)])
def test_a_label_out_of_range_is_found(label: int, row: int) -> None:
    """NumPy would count −1 from the end, and train on the wrong class."""
    labels = np.array([0, 1, 3])
    labels[row] = label
    with pytest.raises(MinigradError, match=f"got label {label} in row {row}, but the logits are of 4 classes, 0 … 3"):
        ops.cross_entropy(host(3, 4), labels)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint64"])
def test_labels_of_any_width(dtype: str) -> None:
    """The range check of 300 classes must not overflow in an eight-bit label."""
    loss = ops.cross_entropy(host(2, 300), np.array([0, 100], dtype))
    assert loss.item() == pytest.approx(ops.cross_entropy(host(2, 300), np.array([0, 100])).item())


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_labels_are_whole_numbers(dtype: str) -> None:
    with pytest.raises(DtypeError, match=f"wants whole numbers as labels, got {dtype}: convert"):
        ops.cross_entropy(host(2, 3), np.zeros(2, dtype))


@pytest.mark.parametrize(("logits", "labels"), [((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3, 1, 1), (2,)), ((0, 3), (0,))])
def test_cross_entropy_says_what_it_takes(logits: Any, labels: Any) -> None:
    with pytest.raises(ShapeError, match=r"got logits \(.*\) and labels \(.*\), wants \(N, K\) and \(N,\)"):
        ops.cross_entropy(Tensor(np.zeros(logits)), np.zeros(labels, int))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_is_below_one(smoothing: float) -> None:
    with pytest.raises(MinigradError, match="label_smoothing must be from 0 to below 1, got"):
        ops.cross_entropy(host(2, 3), np.array([0, 1]), label_smoothing=smoothing)


def test_labels_on_the_host_for_logits_on_the_device(xp: Any) -> None:
    """The commonest slip when switching to the GPU deserves a sentence of its own."""
    if xp is np:
        pytest.skip("needs two backends")
    with pytest.raises(BackendError, match=r"cross_entropy got .*cupy.* and .*numpy"):
        ops.cross_entropy(Tensor(xp.zeros((2, 3))), np.array([0, 1]))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1], "wants an array of whole numbers as labels, got list: use numpy.array"),
        (Tensor([0.0, 1.0]), "wants an array of whole numbers as labels, got Tensor: use numpy.array"),
        (np.zeros((2, 3)), r"wants \(N, K\) and \(N,\): labels\.argmax\(axis=1\) makes numbers of one-hot rows"),
    ],
)
def test_labels_of_other_kinds(labels: Any, sentence: str) -> None:
    with pytest.raises((DtypeError, ShapeError), match=sentence):
        ops.cross_entropy(host(2, 3), labels)
