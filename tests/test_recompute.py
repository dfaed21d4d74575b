"""Recomputing a module in backward: the same bits, less memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from inception.models import create_model
from minigrad import Tensor, nn, no_grad, ops
from minigrad.errors import ShapeError
from minigrad.random import Key, integers, normal

pytestmark = pytest.mark.usefixtures("host_kernels")


def step(model: nn.Module, labels: Any, size: int = 16, dtype: str = "float32") -> tuple[float, int]:
    """The loss of one step, and the bytes held between forward and backward."""
    model.zero_grad()
    model.set_key(Key(3))
    x = Tensor(normal(Key(1), (len(labels), 3, size, size)).astype(dtype))
    before = tracemalloc.get_traced_memory()[0]
    loss = ops.cross_entropy(model(x), labels)
    held = tracemalloc.get_traced_memory()[0] - before
    loss.backward()
    return loss.item(), held


@pytest.fixture
def labels() -> Any:
    return integers(Key(2), 10, 4)


def test_one_branch_alone(labels: Any) -> None:
    """A branch that is run again is called by itself, not begun together with the others. Alone it rounds differently:
    in float32 enough to turn a ReLU or a maximum now and then."""
    plain, thrifty = (create_model("googlenet_small").astype("float64") for _ in range(2))
    thrifty.inception3b.branch2.recompute = thrifty.inception4a.branch1.recompute = True
    for model in (plain, thrifty):
        step(model, labels, dtype="float64")
    for (name, p), (_, q) in zip(plain.named_parameters(), thrifty.named_parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12, err_msg=name)


def stages(model: nn.Module) -> list[nn.Module]:
    return [layer for name, layer in model.children() if name.startswith("inception")]


def test_the_same_bits_for_less_memory(labels: Any) -> None:
    """Gradients of all parameters, running statistics, and less than half of what is otherwise held."""
    plain, thrifty = (create_model("googlenet_small", dropout=0.3) for _ in range(2))
    for module in stages(thrifty):
        module.recompute = True
    tracemalloc.start()
    try:
        (loss, held), (again, held_again) = step(plain, labels), step(thrifty, labels)
    finally:
        tracemalloc.stop()
    assert loss == again
    assert held_again < held / 2
    for (name, p), (_, q) in zip(plain.named_parameters(), thrifty.named_parameters(), strict=True):
        np.testing.assert_array_equal(p.grad, q.grad, err_msg=name)
    for (name, p), (_, q) in zip(plain.named_buffers(), thrifty.named_buffers(), strict=True):
        np.testing.assert_array_equal(p.data, q.data, err_msg=name)


def test_dropout_draws_the_same_mask_again(labels: Any) -> None:
    """Also where it draws from a stream of its own, and where keys have changed since."""
    layer = nn.Sequential(nn.Dropout(0.5))
    layer.recompute = True
    x = Tensor(np.ones((2, 50), np.float32), requires_grad=True)
    for key in (None, Key(1)):
        if key is not None:
            layer.set_key(key)
        y = layer(x)
        layer.set_key(Key(9))
        x.grad = None
        y.sum().backward()
        np.testing.assert_array_equal(x.grad, y.data)  # the mask itself, as x is 1
        assert layer[0].key == Key(9).fold("0")


def test_a_mode_that_changed_before_backward_does_not_matter(labels: Any) -> None:
    """Nor that nobody has called train() yet, so that the mode is the class's."""
    gradients = []
    for recompute in (False, True):
        model = create_model("googlenet_small")
        model.inception3a.recompute = recompute
        x = Tensor(normal(Key(1), (4, 3, 8, 8)).astype("float32"))
        loss = ops.cross_entropy(model(x), labels)
        model.eval()
        with no_grad():
            loss.backward()
        assert not model.inception3a.training
        gradients.append(model.conv1.conv.weight.grad)
    np.testing.assert_array_equal(*gradients)


def test_one_result_only() -> None:
    model = create_model("googlenet_small", aux_logits=True)
    model.recompute = True
    with pytest.raises(ShapeError, match="recompute works for modules with one result, Inception returns several"):
        model(Tensor(np.zeros((2, 3, 16, 16), np.float32)))
