"""Convolution, batch norm and ReLU as one op, and several such units on one input: equal to the ops one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inception.models import ConvBlock, InceptionBlock
from minigrad import Tensor, gradcheck, nn, no_grad, ops, summary
from minigrad.errors import GraphError, ShapeError
from minigrad.random import Key, normal
from minigrad.tensor import record_parts

pytestmark = pytest.mark.usefixtures("host_kernels")


def tensor(*shape: int, name: str = "x") -> Tensor:
    return Tensor(normal(Key(5).fold(name, *shape), shape), requires_grad=True)


def unit(o: int, c: int, k: int, name: str, bias: bool = True) -> ops.ConvNorm:
    """Float64 filters, gamma and beta around 1 and 0, running statistics that are not those of a new layer."""
    return ops.ConvNorm(
        tensor(o, c, k, k, name=f"{name} weight"),
        tensor(o, name=f"{name} bias") if bias else None,
        tensor(o, name=f"{name} gamma"),
        tensor(o, name=f"{name} beta"),
        normal(Key(6).fold(name), (o,)),
        1 + normal(Key(7).fold(name), (o,)) ** 2,
    )


def one_by_one(x: Tensor, u: ops.ConvNorm, training: bool, **window: Any) -> Tensor:
    y = ops.conv2d(x, u.weight, u.bias, **window)
    return ops.batch_norm(y, *u[2:], training=training, momentum=0.3, eps=1e-3, relu=True)


def gradients(x: Tensor, units: list[ops.ConvNorm], results: list[Tensor]) -> list[Any]:
    sum(((y * normal(Key(8).fold(i), y.shape)).sum() for i, y in enumerate(results)), Tensor(np.zeros(()))).backward()
    leaves = [x, *(p for u in units for p in u[:4] if p is not None)]
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad, leaf.node = None, None
    return found


CASES = [
    ([4], 3, {"padding": 1}),
    ([4], 3, {"stride": 2, "padding": 1}),
    ([3, 1, 5], 1, {}),
    ([2, 4], 3, {"padding": 1}),
    ([2, 4], 2, {"stride": 2}),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("widths", "k", "window"), CASES, ids=str)
def test_equal_to_the_ops_one_by_one(widths: list[int], k: int, window: dict[str, Any], bias: bool) -> None:
    """Results, running statistics and every gradient."""
    x = tensor(2, 3, 6, 7)
    together, alone = ([unit(o, 3, k, f"u{i}", bias) for i, o in enumerate(widths)] for _ in range(2))
    results = ops.conv_bn_relu(x, together, training=True, momentum=0.3, eps=1e-3, **window)
    wanted = [one_by_one(x, u, True, **window) for u in alone]
    for y, z in zip(results, wanted, strict=True):
        np.testing.assert_allclose(y.data, z.data, rtol=1e-12, atol=1e-12)
    for u, v in zip(together, alone, strict=True):
        np.testing.assert_allclose(u.running_mean, v.running_mean, rtol=1e-12)
        np.testing.assert_allclose(u.running_var, v.running_var, rtol=1e-12)
    for g, h in zip(gradients(x, together, results), gradients(x, alone, wanted), strict=True):
        np.testing.assert_allclose(g, h, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("widths", "k", "window"), CASES, ids=str)
def test_gradients(widths: list[int], k: int, window: dict[str, Any]) -> None:
    units = [unit(o, 3, k, f"u{i}") for i, o in enumerate(widths)]

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        given = [u._replace(**dict(zip(u._fields, parameters[4 * i : 4 * i + 4]))) for i, u in enumerate(units)]  # noqa: B905
        return ops.concat(ops.conv_bn_relu(x, given, training=True, **window))

    gradcheck(f, tensor(2, 3, 6, 7), *(p for u in units for p in u[:4] if p is not None))


@pytest.mark.parametrize(("widths", "k", "window"), CASES, ids=str)
def test_evaluation_folds_batch_norm_into_the_filters(widths: list[int], k: int, window: dict[str, Any]) -> None:
    x, units = tensor(2, 3, 6, 7), [unit(o, 3, k, f"u{i}", bias=k > 1) for i, o in enumerate(widths)]
    before = [u.running_mean.copy() for u in units]
    with no_grad():
        for u, y in zip(units, ops.conv_bn_relu(x, units, training=False, eps=1e-3, **window), strict=True):
            np.testing.assert_allclose(y.data, one_by_one(x, u, False, **window).data, rtol=1e-11, atol=1e-11)
    assert all((u.running_mean == kept).all() for u, kept in zip(units, before, strict=True))
    with pytest.raises(GraphError, match=r"in evaluation has no gradient: use batch_norm\(conv2d\(x\)\)"):
        ops.conv_bn_relu(x, units, training=False, **window)


def test_refuses_what_does_not_go_together() -> None:
    x = tensor(2, 3, 6, 7)
    with pytest.raises(ShapeError, match=r"wants filters of one size, all with a bias or none: got \(2, 3, 1, 1\), "):
        ops.conv_bn_relu(x, [unit(2, 3, 1, "a"), unit(2, 3, 3, "b")], training=True)
    with pytest.raises(ShapeError, match=r"weight \(2, 4, 1, 1\) wants \(N, 4, H, W\)"):
        ops.conv_bn_relu(x, [unit(2, 4, 1, "a")], training=True)
    with pytest.raises(ShapeError, match="more than one value per channel"):
        ops.conv_bn_relu(tensor(1, 3, 2, 2), [unit(2, 3, 2, "a")], training=True)


# ---- An op with several results ----


def split(x: Tensor, seen: list[Any]) -> list[Tensor]:
    """x and 2x."""

    def backward(dys: list[Any]) -> list[Any]:
        seen.append([None if dy is None else dy.copy() for dy in dys])
        return [sum(k * dy for k, dy in enumerate(dys, 1) if dy is not None)]

    return record_parts("split", [x.data * 1, x.data * 2], [x], backward)


def test_parts_meet_before_their_op_hands_anything_on() -> None:
    """One part used twice, by two paths of different length: its gradients are summed, and the op runs once."""
    x, seen = tensor(3), []
    one, two = split(x, seen)
    (one * 3 + (two * two).exp().log() + one).sum().backward()
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0][0], np.full(3, 4.0))
    np.testing.assert_allclose(seen[0][1], 4 * x.data, rtol=1e-12)  # 2 · two
    np.testing.assert_allclose(x.grad, 4 + 8 * x.data, rtol=1e-12)


def test_a_part_that_nobody_uses_has_no_gradient() -> None:
    x, seen = tensor(3), []
    split(x, seen)[1].sum().backward()
    assert seen[0][0] is None
    np.testing.assert_array_equal(x.grad, np.full(3, 2.0))


def test_a_second_backward_through_parts_is_explained() -> None:
    one, _ = split(tensor(3), [])
    one.sum().backward()
    with pytest.raises(GraphError, match="reached 'split' a second time"):
        one.sum().backward()


def test_parts_without_gradient_record_nothing() -> None:
    with no_grad():
        assert all(part.node is None for part in split(tensor(3), []))


# ---- Layers ----


def block() -> InceptionBlock:
    return InceptionBlock(6, 2, 3, 4, 1, 2, 3).astype("float64")  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["train", "eval", "eval with gradient", "one frozen"])
def test_a_module_is_equal_to_its_branches(mode: str) -> None:
    x, together, alone = tensor(2, 6, 5, 4), block(), block()
    alone.load_state_dict(together.state_dict())
    for module in (together, alone):
        module.train(not mode.startswith("eval"))
        if mode == "one frozen":
            module.branch2[0].batchnorm.eval()
    recording = mode != "eval"
    if recording:
        y, z = together(x), nn.Branches.forward(alone, x)
        for result in (y, z):
            result.backward(normal(Key(1), y.shape))
            x.grad, x.node = None, None
        for (name, p), (_, q) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
            np.testing.assert_allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11, err_msg=name)
    else:
        with no_grad():
            y, z = together(x), nn.Branches.forward(alone, x)
    np.testing.assert_allclose(y.data, z.data, rtol=1e-11, atol=1e-12)


def test_an_error_names_the_layer_it_belongs_to() -> None:
    module = block()
    vars(module.branch2)["0"] = ConvBlock(5, 3, kernel_size=1).astype("float64")
    with pytest.raises(ShapeError, match=r"branch2\.0\.conv: conv2d got .*, weight \(3, 5, 1, 1\) wants \(N, 5, H"):
        module(tensor(2, 6, 5, 4))


def test_summary_sees_each_unit() -> None:
    rows = {row.path: row for row in summary(block(), (6, 5, 4)).rows}
    for path, (c, o) in {"branch1": (6, 2), "branch2.0": (6, 3), "branch3.0": (6, 1)}.items():
        assert rows[path].parameters == c * o + o + 2 * o, path
        assert rows[path].multiply_adds == c * o * 20, path
        assert rows[path].output == (o, 5, 4), path


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("width", [1, 4, 12])
def test_a_batch_norm_of_another_width_is_refused(width: int, training: bool) -> None:
    """One of a single channel would be broadcast, and of two units' channels each would get some of the other's."""
    first, second = unit(8, 3, 1, "first"), unit(8, 3, 1, "second")
    norms = unit(width, 3, 1, "norm")[2:], unit(16 - width, 3, 1, "other norm")[2:]
    wrong = [ops.ConvNorm(*own[:2], *norm) for own, norm in zip((first, second), norms, strict=True)]
    for units in (wrong[:1], wrong):
        with no_grad(), pytest.raises(ShapeError, match=rf"got 8 filters, and gamma, .* of \[\({width},\)"):
            ops.conv_bn_relu(tensor(2, 3, 4, 4), units, training=training)


def test_the_layer_of_another_width_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ConvNormReLU(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(1)))
    with pytest.raises(ShapeError) as caught:
        model(Tensor(np.ones((2, 3, 4, 4), np.float32)))
    assert str(caught.value).startswith("1.batchnorm: batch_norm got an input of shape (2, 8, 4, 4), gamma (1,)")
