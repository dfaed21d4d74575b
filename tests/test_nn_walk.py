"""Layers in lists, tuples and dicts, layers that are used twice, and layers that know their parent are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minigrad import Tensor, nn, ops, optim
from minigrad.errors import ShapeError, StateError
from minigrad.random import Key, normal
from minigrad.summary import summary
from minigrad.watch import each_op


def rows(*shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(normal(Key(3).fold(*shape), shape).astype(dtype))


class Listed(nn.Module):
    """Layers, parameters and buffers in containers of every kind, nested, beside what is none of these."""

    def __init__(self) -> None:
        self.layers = [nn.Linear(3, 3), nn.Linear(3, 2)]
        self.heads = {"a": (nn.Dropout(0.5), [nn.Linear(2, 4, bias=False)]), "sizes": (3, 2), 7: nn.BatchNorm2d(2)}
        self.scales = [nn.Parameter(np.ones(4, "float32")), None, "no layer"]
        self.circle: list[Any] = []
        self.circle.append(self.circle)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        dropout, (head,) = self.heads["a"]
        return head(dropout(x)) * self.scales[0]


NAMES = ["scales.0", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "heads.a.1.0.weight",
         "heads.7.gamma", "heads.7.beta"]  # fmt: skip
PATHS = ["", "layers.0", "layers.1", "heads.a.0", "heads.a.1.0", "heads.7"]


# ---- Containers ----


def test_names_and_paths_tell_the_place_in_the_container() -> None:
    model = Listed()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert [path for path, _ in model.named_modules()] == PATHS
    assert [path for path, _ in model.children()] == PATHS[1:]
    assert [name for name, _ in model.named_buffers()] == ["heads.7.running_mean", "heads.7.running_var"]
    assert sorted(model.state_dict()) == sorted([*NAMES, "heads.7.running_mean", "heads.7.running_var"])


def test_state_goes_round() -> None:
    one, two = Listed(), Listed()
    two.load_state_dict(one.state_dict())
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(two.state_dict()[name], array)
    assert (two.layers[1].weight.data == one.layers[1].weight.data).all()


def test_layers_in_a_list_are_trained() -> None:
    """Each parameter moves by its gradient: found, differentiated and updated."""
    model = Listed()
    before = model.state_dict()
    model.eval()(rows(5, 3)).sum().backward()
    optim.SGD(model.parameters(), 1.0).step()
    for name, parameter in model.named_parameters():
        if not name.startswith("heads.7"):  # not called
            np.testing.assert_allclose(parameter.data, before[name] - parameter.grad, rtol=1e-6)
            assert abs(parameter.grad).max() > 0, name


def test_modes_freezing_and_keys_reach_them() -> None:
    model = Listed()
    model.eval()
    assert [module.training for _, module in model.named_modules()] == [False] * 6
    model.train().set_key(Key(1))
    assert model.heads["a"][0].key == Key(1).fold("heads.a.0")
    model.freeze()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.heads[7].training


def test_an_error_and_an_event_name_the_place() -> None:
    model, seen = Listed(), []
    with each_op(model, lambda event: seen.append((event.place, event.op))):
        model.eval()(rows(5, 3))
    assert seen == [("layers.0", "linear"), ("layers.1", "linear"), ("heads.a.1.0", "linear"), ("(model)", "multiply")]
    model.layers[1] = nn.Linear(4, 2)
    with pytest.raises(ShapeError, match=r"^layers\.1: linear got an input of shape \(5, 3\)"):
        model(rows(5, 3))


def test_repr_shows_them() -> None:
    assert repr(Listed()).splitlines()[1:4] == ["  layers.0: Linear(3 → 3)", "  layers.1: Linear(3 → 2)",
                                                "  heads.a.0: Dropout(p=0.5)"]  # fmt: skip


class Tower(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_summary_counts_them() -> None:
    """3×3 filters, 3 → 4 channels: 4·3·9 weights and 4 biases, 4·3·9 multiply-adds at each of 6·6 pixels."""
    found = summary(Tower(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8))
    assert [(row.path, row.parameters, row.multiply_adds) for row in found.rows] == [
        ("layers.0", 112, 108 * 36), ("layers.1", 0, 0)]  # fmt: skip


def test_two_tensors_of_one_name_are_refused() -> None:
    """A dict may hold both: one would replace the other in a file."""
    model = Tower()
    model.layers = {1: nn.Linear(2, 1), "1": nn.Linear(2, 1)}  # type: ignore[assignment]
    with pytest.raises(StateError, match=r"two tensors of this Tower have the name 'layers\.1\.weight'"):
        model.state_dict()


# ---- A layer that is used twice ----


def twice() -> tuple[nn.Linear, nn.Sequential]:
    layer = nn.Linear(3, 3)
    return layer, nn.Sequential(layer, nn.ReLU(), layer)


def test_a_layer_used_twice_is_one_layer() -> None:
    """3·3 weights and 3 biases: 12 parameters, each once, and each updated once by a step."""
    layer, model = twice()
    assert sum(parameter.size for parameter in model.parameters()) == 12
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert [path for path, _ in model.named_modules()] == ["", "0", "1"]
    assert len(model) == 3
    for parameter in model.parameters():
        parameter.grad = np.ones_like(parameter.data)
    before = layer.weight.data.copy()
    assert float(optim.clip_by_norm(model.parameters(), 100.0)) == pytest.approx(12**0.5)
    optim.SGD(model.parameters(), 0.5).step()
    np.testing.assert_allclose(layer.weight.data, before - 0.5, rtol=1e-6)


def test_its_gradient_is_the_sum_over_its_uses() -> None:
    """y = w²·x at w = 3, x = 5: dy/dw = 2·w·x = 30."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data[...] = 3
    nn.Sequential(layer, layer)(Tensor(np.full((1, 1), 5, "float32"))).sum().backward()
    assert layer.weight.grad.item() == 30


def test_both_names_load() -> None:
    layer, model = twice()
    weight, bias = np.arange(9.0).reshape(3, 3), np.ones(3)
    for names in (["0"], ["2"], ["0", "2"]):
        layer.weight.data[...] = 0
        model.load_state_dict(
            {f"{name}.{kind}": x for name in names for kind, x in [("weight", weight), ("bias", bias)]}
        )
        np.testing.assert_array_equal(layer.weight.data, weight)


def test_names_in_conflict_are_refused_and_nothing_is_changed() -> None:
    layer, model = twice()
    before = layer.weight.data.copy()
    state = {"0.weight": np.zeros((3, 3)), "2.weight": np.ones((3, 3)), "0.bias": np.zeros(3)}
    with pytest.raises(StateError, match=r"in conflict \(1\): 0\.weight and 2\.weight are one tensor, but differ"):
        model.load_state_dict(state)
    with pytest.raises(StateError, match=r"missing \(1\): 0\.bias; unexpected \(1\): 1\.weight"):
        model.load_state_dict({"2.weight": np.ones((3, 3)), "1.weight": np.ones((3, 3))})
    np.testing.assert_array_equal(layer.weight.data, before)


def test_a_parameter_of_two_layers_is_one_parameter() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    state = model.state_dict()
    state["1.weight"] = state["0.weight"]
    model.load_state_dict(state)


def test_summary_counts_its_parameters_once_and_its_work_twice() -> None:
    conv = nn.Conv2d(2, 2, 1, bias=False)
    found = summary(nn.Sequential(conv, conv), (2, 3, 3))
    assert (found.parameters, found.multiply_adds) == (4, 2 * 4 * 9)


# ---- A child that knows its parent ----


def test_a_child_may_keep_its_parent() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].parent = model
    model[1].parents = [model, {"again": model}]
    assert [path for path, _ in model.named_modules()] == ["", "0", "1"]
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert repr(model) == (
        "Sequential(\n  0: Linear(2 → 2\n    parent: Sequential(as above)\n  )\n"
        "  1: ReLU(\n    parents.0: Sequential(as above)\n    parents.1.again: Sequential(as above)\n  )\n)"
    )
    model.load_state_dict({"0.parent.0.weight": np.ones((2, 2)), "0.bias": np.zeros(2)})  # a name by way of the parent
    assert (model.eval()[0].weight.data == 1).all()
    ops.cross_entropy(model(rows(3, 2)), np.zeros(3, int)).backward()
