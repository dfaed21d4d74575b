"""Changes in place between forward and backward: those that minigrad makes are named, and no right gradient is refused.

The rule is PyTorch's: backward refuses a value that it kept and that has been changed since.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minigrad import Tensor, nn, no_grad, ops, optim, record
from minigrad.errors import GraphError
from minigrad.random import Key, normal, seeded
from minigrad.summary import _arrays_in


def leaf(*shape: int, name: str = "x", dtype: str = "float64") -> Tensor:
    return Tensor(normal(Key(5).fold(name, *shape), shape).astype(dtype), requires_grad=True)


def images(*shape: int) -> Tensor:
    return leaf(*(shape or (2, 3, 5, 5)))


def linear() -> nn.Linear:
    with seeded(0):
        model = nn.Linear(2, 1)
    model.weight.data[...], model.bias.data[...] = [[1, 2]], 3
    return model


# ---- Named ----


def test_the_gradient_of_a_weight_that_has_moved_is_refused() -> None:
    """y = (w·x + b)², dy/dx = 2·(w·x + b)·w = 2·6·[1, 2] at x = [1, 1]: right before the step, refused after it."""
    for moves in (False, True):
        model, x = linear(), Tensor(np.ones((1, 2), "f4"), requires_grad=True)
        y = (model(x) * model(x)).sum()
        model(Tensor(np.ones((1, 2), "f4"))).sum().backward()
        if not moves:
            y.backward()
            np.testing.assert_array_equal(x.grad, [[12, 24]])
            continue
        optim.SGD(model.parameters(), 0.5).step()
        message = (
            r"backward of 'linear' needs a Parameter of shape \(1, 2\) as it was in forward, and SGD\.step\(\) has "
            r"changed it since: call backward\(\) before, or compute the loss again"
        )
        with pytest.raises(GraphError, match=message):
            y.backward()
        y = (model(x) * model(x)).sum()
        y.backward()  # the remedy


STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD.step": lambda model: optim.SGD(model.parameters(), 0.1).step(),
    "RMSProp.step": lambda model: optim.RMSProp(model.parameters(), 0.1).step(),
    "AdamW.step": lambda model: optim.AdamW(model.parameters(), 0.1).step(),
    "Muon.step": lambda model: optim.Muon(model.parameters(), 0.1).step(),
    "load_state_dict": lambda model: model.load_state_dict({k: 0 * v for k, v in model.state_dict().items()}),
}


def unit(relu: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, relu=relu))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), "conv2d"),
    "convolution by groups, of views of the weight": (lambda: nn.Conv2d(3, 6, 3, groups=3), "conv2d"),
    "batch norm": (lambda: nn.BatchNorm2d(3), "batch_norm"),
    "one op": (lambda: nn.ConvNormReLU(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, relu=True)), "conv_bn_relu"),
    "several as one op": (
        lambda: nn.Branches(*(nn.ConvNormReLU(nn.Conv2d(3, o, 1), nn.BatchNorm2d(o, relu=True)) for o in (2, 3))),
        "conv_bn_relu",
    ),
    "recomputed": (unit, "recompute"),
}


@pytest.mark.parametrize("change", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_whatever_changes_weights_is_named_by_every_op_that_keeps_them(model: str, change: str) -> None:
    make, op = MODELS[model]
    layer, x = make().astype("float64"), images()
    layer.recompute = model == "recomputed"
    for parameter in layer.parameters():
        parameter.grad = parameter.data + 1
    y = layer(x)
    STEPS[change](layer)
    with pytest.raises(
        GraphError, match=rf"backward of '{op}' needs a (Parameter|Tensor) .*{change}\(\) has changed it since"
    ):
        y.backward(np.ones(y.shape))


def test_a_frozen_weight_is_kept_for_the_gradient_of_x() -> None:
    layer, x = nn.Linear(2, 3).astype("float64").freeze(), leaf(4, 2)
    y = layer(x)
    layer.load_state_dict({"weight": np.zeros((3, 2)), "bias": np.zeros(3)})
    with pytest.raises(GraphError, match=r"'linear' needs a Parameter of shape \(3, 2\)"):
        y.backward(np.ones((4, 3)))


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w.reshape(3, 2), lambda w: w[:1], lambda w: w.detach()])
def test_a_view_changes_with_its_whole(view: Callable[[Tensor], Tensor]) -> None:
    layer, x = nn.Linear(3, 2).astype("float64"), leaf(1)
    y = view(layer.weight) * x
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(GraphError, match=r"'multiply' needs a Tensor of shape .* load_state_dict\(\) has changed it"):
        y.backward(np.ones(y.shape))


def test_running_statistics_that_are_read_again() -> None:
    """A recomputed layer in evaluation reads them in backward; a step in training has moved them."""
    layer, x = unit().astype("float64").eval(), images()
    layer.recompute = True
    y = layer(x)
    layer.train()(images(3, 3, 5, 5))
    with pytest.raises(GraphError, match=r"'recompute' needs a Tensor of shape \(4,\) .* a forward pass in training"):
        y.backward(np.ones(y.shape))


def test_an_own_op_keeps_all_its_inputs_unless_it_says_so() -> None:
    for kept, refused in ((None, True), ((), False)):
        x = leaf(3)
        y = record("own", x.data * 2, (x,), lambda dy: dy * 2, kept=kept)
        x.data[...] = 0
        x.changed("the test")
        if refused:
            with pytest.raises(
                GraphError, match=r"'own' needs a Tensor of shape \(3,\) .* and the test has changed it"
            ):
                y.backward(np.ones(3))
        else:
            y.backward(np.ones(3))
            np.testing.assert_array_equal(x.grad, [2, 2, 2])


@pytest.mark.parametrize("into", ["float32", "float64"])
def test_a_gradient_never_lands_in_a_parameter_of_another_dtype(into: str) -> None:
    """A bias is not kept, and its gradient would be of the dtype that it had."""
    layer = nn.Linear(2, 3).astype("float64" if into == "float32" else "float32")
    y = layer(leaf(4, 2, dtype=str(layer.weight.dtype)))
    layer.astype(into)
    with pytest.raises(GraphError, match=r"a gradient for a Parameter of shape .* moved or converted since forward"):
        y.backward(np.ones((4, 3)))
    assert all(parameter.grad is None for parameter in layer.parameters())


# ---- Not refused, and right ----


def test_what_an_op_does_not_keep_may_change() -> None:
    """The bias of a layer; and the weight of a first layer, which only the gradient of its input would need."""
    x, layer = Tensor(leaf(4, 2).data), nn.Linear(2, 3).astype("float64")
    y = layer(x)
    layer.load_state_dict(layer.state_dict())
    y.backward(np.ones((4, 3)))
    np.testing.assert_allclose(layer.weight.grad, np.broadcast_to(x.data.sum(0), (3, 2)))
    np.testing.assert_array_equal(layer.bias.grad, [4, 4, 4])


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_may_move(training: bool) -> None:
    """Batch norm keeps the statistics that it has used: dx is that of a layer which is called once alone."""
    gradients = []
    for again in (False, True):
        layer, x = nn.BatchNorm2d(3).astype("float64").train(training), images()
        y = layer(x)
        if again:
            layer.train()(images(3, 3, 5, 5))
        y.backward(normal(Key(1), y.shape))
        gradients.append(x.grad)
    np.testing.assert_array_equal(*gradients)


def test_a_shared_layer_that_is_recomputed_twice() -> None:
    """The first one's backward puts running statistics back, and the second one's has kept none of them."""
    for training in (True, False):
        gradients = []
        for recompute in (False, True):
            layer = nn.BatchNorm2d(3).astype("float64").train(training)
            layer.recompute = recompute
            x = images()
            layer(layer(x)).backward(normal(Key(1), x.shape))
            gradients.append(x.grad)
        np.testing.assert_allclose(*gradients, rtol=1e-12, atol=1e-13)


def test_two_losses_before_one_step() -> None:
    model, x = linear(), Tensor(np.ones((1, 2), "f4"))
    one, two = model(x).sum(), (model(x) * 2.0).sum()
    one.backward()
    two.backward()
    optim.SGD(model.parameters(), 0.5).step()
    np.testing.assert_array_equal(model.weight.data, [[1 - 0.5 * 3, 2 - 0.5 * 3]])


def test_freezing_after_forward_leaves_no_gradient() -> None:
    layer, x = nn.Linear(2, 3).astype("float64"), leaf(4, 2)
    y = layer(x)
    layer.freeze()
    y.backward(np.ones((4, 3)))
    np.testing.assert_allclose(x.grad, np.broadcast_to(layer.weight.data.sum(0), (4, 2)))
    assert layer.weight.grad is None
    assert layer.bias.grad is None


# ---- What is said to be kept is what is kept ----

Op = Callable[..., Tensor]
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "add": (lambda x, y: x + y, [(3,), (3,)]),
    "multiply": (lambda x, y: x * y, [(3,), (3,)]),
    "multiply by a constant": (lambda x: x * Tensor(np.ones(3)), [(3,)]),
    "divide": (lambda x, y: x / y, [(3,), (3,)]),
    "power": (lambda x: x**2, [(3,)]),
    "exp": (lambda x: x.exp(), [(3,)]),
    "log": (lambda x: (x * x).log(), [(3,)]),
    "sqrt": (lambda x: (x * x).sqrt(), [(3,)]),
    "matmul": (lambda x, y: x @ y, [(2, 3), (3, 4)]),
    "sum": (lambda x: x.sum(), [(3,)]),
    "reshape": (lambda x: x.reshape(3, 1), [(3,)]),
    "transpose": (lambda x: x.T, [(2, 3)]),
    "index": (lambda x: x[1:], [(3,)]),
    "relu": (ops.relu, [(3,)]),
    "tanh": (ops.tanh, [(3,)]),
    "sigmoid": (ops.sigmoid, [(3,)]),
    "maximum": (ops.maximum, [(3,)]),
    "dropout": (lambda x: ops.dropout(x, 0.5, Key(0)), [(3,)]),
    "softmax": (ops.softmax, [(2, 3)]),
    "log_softmax": (ops.log_softmax, [(2, 3)]),
    "cross_entropy": (lambda x: ops.cross_entropy(x, np.array([0, 1])), [(2, 3)]),
    "linear": (ops.linear, [(2, 3), (4, 3), (4,)]),
    "conv2d": (ops.conv2d, [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
    "concat": (lambda x, y: ops.concat([x, y]), [(2, 3), (2, 3)]),
    "batch_norm": (
        lambda x, g, b: ops.batch_norm(x, g, b, np.zeros(3), np.ones(3), training=True),
        [(2, 3, 2, 2), (3,), (3,)],
    ),
    "conv_bn_relu": (
        lambda x, *p: ops.conv_bn_relu(x, [ops.ConvNorm(*p, np.zeros(4), np.ones(4))], training=True)[0],
        [(2, 3, 5, 5), (4, 3, 3, 3), (4,), (4,), (4,)],
    ),
    "two conv_bn_relu": (
        lambda x, *p: ops.concat(
            ops.conv_bn_relu(
                x, [ops.ConvNorm(*q, np.zeros(4), np.ones(4)) for q in (p[:4], p[4:])], training=True
            )
        ),
        [(2, 3, 5, 5), *[(4, 3, 3, 3), (4,), (4,), (4,)] * 2],
    ),
    "local_response_norm": (ops.local_response_norm, [(2, 3, 2, 2)]),
    "max_pool2d": (lambda x: ops.max_pool2d(x, 2), [(1, 2, 4, 4)]),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, 2), [(1, 2, 4, 4)]),
    "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x, 1), [(1, 2, 4, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_op_names_the_inputs_that_its_backward_holds(name: str) -> None:
    """Looked up in the closures: an input whose memory one of them holds is kept, and no other."""
    op, shapes = OPS[name]
    inputs = [leaf(*shape, name=str(i)) for i, shape in enumerate(shapes)]
    stack, counted, held = [op(*inputs).node], set(), []
    while stack:
        node = stack.pop()
        counted |= {id(changes) for changes, *_ in node.kept}
        held += list(_arrays_in(node.backward, set())) if node.inputs else []
        stack += [parent for parent in node.inputs if parent is not None]
    for i, x in enumerate(inputs):
        inside = any(np.shares_memory(x.data, array) for array in held)
        assert (id(x.changes) in counted) == inside, f"input {i}"


def test_every_op_is_in_the_table() -> None:
    others = {"ConvNorm", "global_avg_pool2d"}  # no op, and another's
    assert set(ops.__all__) - others <= set(OPS)


# ---- The count ----


def test_a_version_counts_changes_in_place_alone() -> None:
    layer, x = unit(), Tensor(np.ones((2, 3, 5, 5), "f4"))
    tensors = dict(layer._named(Tensor))

    def versions() -> list[int]:
        return [tensor.version for tensor in tensors.values()]

    assert list(tensors)[-2:] == ["1.running_mean", "1.running_var"]
    assert versions() == [0] * 6
    with no_grad():
        layer.eval()(x)
    assert versions() == [0] * 6
    layer.train()(x)
    assert versions() == [0, 0, 0, 0, 1, 1]
    layer.load_state_dict(layer.state_dict())
    assert versions() == [1, 1, 1, 1, 2, 2]
    layer(x).sum().backward()
    optim.SGD(layer.parameters(), 0.1).step()
    assert versions() == [2, 2, 2, 2, 3, 3]


def test_copies_count_for_themselves() -> None:
    layer = nn.Linear(2, 1)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    layer.load_state_dict(layer.state_dict())
    assert [other.weight.version for other in others] == [0, 0]
    assert copy.copy(layer.weight).version == 1  # which shares the array
