"""Modules: how they find what they hold, save and load it, and say where something went wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from inception.training.average import Average
from minigrad import Tensor, backend, nn, no_grad, ops, optim
from minigrad.backend import array_module, asarray, to_host
from minigrad.errors import BackendError, MinigradError, ShapeError, StateError
from minigrad.nn import init
from minigrad.optim import SGD
from minigrad.random import Key, next_key, normal, seeded


def pictures(*shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(normal(Key(9).fold(*shape), shape).astype(dtype))


class Net(nn.Module):
    """Attributes of every kind, in an order that is not the alphabet's."""

    def __init__(self) -> None:
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(asarray(np.ones((), "float32")))
        self.name = "net"
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.average = Tensor(asarray(np.zeros(2, "float32")))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        return self.head(ops.global_avg_pool2d(x).flatten()) * self.scale


# ---- Walking the tree ----


def test_parameters_come_in_the_order_of_definition() -> None:
    """Optimizer states, checkpoints and exports rely on it; a module's own come before its children's."""
    names = [name for name, _ in Net().named_parameters()]
    wanted = "scale stem.weight stem.bias body.0.gamma body.0.beta head.weight head.bias"
    assert names == wanted.split()


def test_buffers_are_tensors_that_are_not_trained() -> None:
    assert [name for name, _ in Net().named_buffers()] == ["average", "body.0.running_mean", "body.0.running_var"]


def test_modules_come_with_their_paths() -> None:
    wanted = ["", "stem", "body", "body.0", "body.1", "head"]
    assert [path for path, _ in Net().named_modules()] == wanted


def test_a_layer_set_later_is_found() -> None:
    """There is no registry that could miss it, and one that is deleted is gone."""
    net = Net()
    net.extra = nn.Linear(2, 2, bias=False)
    assert [name for name, _ in net.named_parameters()][-1] == "extra.weight"
    del net.extra
    assert [name for name, _ in net.named_parameters()][-1] == "head.bias"


def test_parameters_are_leaves_that_want_gradients() -> None:
    net = Net()
    net(pictures(2, 3, 5, 5)).sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in net.parameters())
    assert all(buffer.grad is None for _, buffer in net.named_buffers())


def test_zero_grad_forgets_all_gradients() -> None:
    net = Net()
    net(pictures(2, 3, 5, 5)).sum().backward()
    net.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Module does not define forward"):
        nn.Module()(1)


# ---- Modes ----


def test_train_and_eval_reach_every_layer() -> None:
    net = Net()
    assert net.training
    assert net.eval() is net
    assert not any(module.training for _, module in net.named_modules())
    assert all(module.training for _, module in net.train().named_modules())


def test_evaluation_is_repeatable() -> None:
    """No dropout, no running statistics on the move."""
    net, x = Net().eval(), pictures(2, 3, 5, 5)
    state = net.state_dict()
    np.testing.assert_array_equal(net(x).data, net(x).data)
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, state[name])


def test_training_moves_the_running_statistics() -> None:
    net = Net()
    net(pictures(2, 3, 5, 5))
    assert net.body[0].running_mean.data.any()


# ---- State ----


def test_state_dict_is_a_copy_on_the_host(xp: Any) -> None:
    """In C order, whatever the layout in memory: files are read by others, too."""
    net = Net()
    state = net.state_dict()
    assert list(state)[:4] == ["scale", "average", "stem.weight", "stem.bias"]
    assert all(type(value) is np.ndarray and value.flags.c_contiguous for value in state.values())
    state["stem.weight"][...] = 0
    assert to_host(net.stem.weight.data).any()


def test_state_goes_round(xp: Any) -> None:
    """Into other memory than the optimizer holds, a load would have no effect on training."""
    with seeded(1):
        one = Net()
    with seeded(2):
        other = Net()
    one(Tensor(xp.asarray(pictures(2, 3, 5, 5).data)))  # moves the running statistics
    memory = [parameter.data for parameter in other.parameters()]
    other.load_state_dict(one.state_dict())
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, one.state_dict()[name])
    assert all(parameter.data is data for parameter, data in zip(other.parameters(), memory, strict=True))


def test_loading_lists_all_misfits_at_once_and_changes_nothing() -> None:
    """One at a time would take one attempt per layer; half a load would be worse than none."""
    net = Net()
    before = net.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    state["head.wieght"] = state.pop("head.weight")
    state["extra"] = np.zeros(3)
    state["stem.weight"] = np.zeros((4, 1, 3, 3))
    with pytest.raises(StateError) as caught:
        net.load_state_dict(state)
    message = str(caught.value)
    assert "missing (1): head.weight" in message
    assert "unexpected (2): head.wieght, extra" in message
    assert "of another shape (1): stem.weight has (4, 1, 3, 3), the model wants (4, 3, 3, 3)" in message
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_long_list_of_misfits_is_cut() -> None:
    with pytest.raises(StateError, match=r"unexpected \(20\): 0, 1, 2, 3, 4, 5, 6, 7, …$"):
        Net().load_state_dict({**Net().state_dict(), **{str(i): np.zeros(1) for i in range(20)}})


def test_loading_converts_to_the_models_dtype() -> None:
    """A float64 file must not turn a float32 model into a float64 one."""
    net = Net()
    net.load_state_dict({name: value.astype("float64") for name, value in net.state_dict().items()})
    assert all(parameter.dtype == np.float32 for parameter in net.parameters())


def test_astype_converts_parameters_and_buffers() -> None:
    net = Net().astype("float64")
    assert all(tensor.dtype == np.float64 for _, tensor in [*net.named_parameters(), *net.named_buffers()])
    assert net(pictures(2, 3, 5, 5, dtype="float64")).dtype == np.float64


def test_weights_are_channels_last(xp: Any) -> None:
    """So that `filter_matrix` is a view; after a conversion and a load as well."""
    layer = nn.Conv2d(3, 4, (3, 5))
    for _ in range(2):
        assert layer.weight.data.transpose(0, 2, 3, 1).flags.c_contiguous
        layer.astype("float64").load_state_dict(layer.state_dict())


# ---- Where something went wrong ----


class Broken(nn.Module):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def forward(self, x: Any) -> Any:
        raise self.error


def nested(error: Exception) -> nn.Module:
    return nn.Branches(left=nn.Sequential(nn.ReLU(), nn.Sequential(Broken(error))))


def test_our_errors_carry_the_layers_path() -> None:
    """In a network of 150 layers, 'conv2d got …' alone does not help."""
    with pytest.raises(ShapeError, match=r"^left\.1\.0: it does not fit$"):
        nested(ShapeError("it does not fit"))(pictures(1, 1, 2, 2))


def test_other_errors_get_a_note() -> None:
    """Their message and type belong to others, and callers may look at them."""
    error = KeyError("b")
    with pytest.raises(KeyError) as caught:
        nested(error)(pictures(1, 1, 2, 2))
    assert caught.value is error
    assert caught.value.__notes__ == ["in layer left.1.0"]


def test_a_layer_by_itself_has_no_path() -> None:
    with pytest.raises(ShapeError, match=r"^it does not fit$"):
        Broken(ShapeError("it does not fit"))(None)
    with pytest.raises(KeyError) as caught:
        Broken(KeyError("b"))(None)
    assert not hasattr(caught.value, "__notes__")


def test_an_error_names_the_innermost_layer() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 2, 1)))
    with pytest.raises(ShapeError, match=r"^1\.0: conv2d got .* \(1, 8, 2, 2\), weight \(2, 4, 1, 1\) wants \(N, 4, H"):
        model(pictures(1, 3, 2, 2))


def test_a_model_works_on_after_an_error() -> None:
    """Observers and BLAS guards are left on the way out."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(ShapeError):
        model(pictures(1, 4, 2, 2))
    assert model(pictures(1, 3, 2, 2)).shape == (1, 2, 2, 2)


# ---- repr ----


def test_repr_is_a_tree_with_names() -> None:
    assert repr(nn.Branches(one=nn.ReLU(), two=nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)))) == (
        "Branches(\n  one: ReLU()\n  two: Sequential(\n    0: Linear(2 → 3)\n    1: Dropout(p=0.5)\n  )\n)"
    )


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: nn.Conv2d(4, 8, 3, groups=2),
            "Conv2d(4 → 8, 3×3, stride=(1, 1), padding=(0, 0), groups=2)",
        ),
        (lambda: nn.Conv2d(3, 4, (1, 7), bias=False), "Conv2d(3 → 4, 1×7, stride=(1, 1), padding=(0, 0), bias=False)"),
        (lambda: nn.BatchNorm2d(4, relu=True), "BatchNorm2d(4, eps=1e-05, momentum=0.1, relu=True)"),
        (lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True), "MaxPool2d(3, stride=2, padding=0, ceil)"),
        (lambda: nn.AvgPool2d(3, count_padding=False), "AvgPool2d(3, stride=3, padding=0, count_padding=False)"),
        (lambda: nn.AdaptiveAvgPool2d(4), "AdaptiveAvgPool2d(4)"),
        (lambda: nn.LocalResponseNorm(), "LocalResponseNorm(size=5, alpha=0.0001, beta=0.75, k=1.0)"),
        (lambda: nn.Linear(2, 3, bias=False), "Linear(2 → 3, bias=False)"),
        (lambda: nn.Flatten(), "Flatten()"),
    ],
)
def test_repr_names_the_options(layer: Callable[[], nn.Module], text: str) -> None:
    assert repr(layer()) == text


# ---- Containers ----


def test_sequential_runs_one_after_the_other() -> None:
    double, add = nn.Linear(1, 1), nn.Linear(1, 1)
    for layer, weight, bias in ((double, 2, 0), (add, 1, 3)):
        layer.weight.data[...], layer.bias.data[...] = weight, bias
    model = nn.Sequential(double, add)
    assert model(Tensor([[5.0]])).item() == 13.0
    assert len(model) == 2
    assert model[1] is add
    assert model[-1] is add


def test_more_than_ten_layers_keep_their_order() -> None:
    """By name, "10" would come before "2"."""
    layers = [nn.ReLU() for _ in range(12)]
    model = nn.Sequential(*layers)
    assert [child for _, child in model.children()] == layers


def test_branches_see_the_same_input_and_are_joined_in_order() -> None:
    one, two = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1)
    x = pictures(2, 3, 4, 4)
    y = nn.Branches(two, tail=one)(x)
    np.testing.assert_array_equal(y.data, np.concatenate([two(x).data, one(x).data], axis=1))


def test_branches_have_their_names() -> None:
    assert [name for name, _ in nn.Branches(nn.ReLU(), pool=nn.ReLU()).children()] == ["0", "pool"]


# ---- Layers hand their options to the ops ----


@pytest.mark.parametrize(
    ("layer", "op"),
    [
        (
            lambda: nn.Conv2d(3, 4, (1, 3), stride=(2, 1), padding=(0, 1)),
            lambda layer, x: ops.conv2d(x, layer.weight, layer.bias, stride=(2, 1), padding=(0, 1)),
        ),
        (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), lambda _, x: ops.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
        (
            lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_padding=False),
            lambda _, x: ops.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_padding=False),
        ),
        (lambda: nn.AvgPool2d(2), lambda _, x: ops.avg_pool2d(x, 2, 2)),
        (lambda: nn.AdaptiveAvgPool2d((2, 3)), lambda _, x: ops.adaptive_avg_pool2d(x, (2, 3))),
        (
            lambda: nn.LocalResponseNorm(3, alpha=0.5, beta=0.6, k=2.0),
            lambda _, x: ops.local_response_norm(x, 3, alpha=0.5, beta=0.6, k=2.0),
        ),
        (lambda: nn.ReLU(), lambda _, x: ops.relu(x)),
        (lambda: nn.Flatten(), lambda _, x: x.reshape(2, -1)),
    ],
)
def test_a_layer_is_its_op(layer: Callable[[], Any], op: Callable[[Any, Tensor], Tensor]) -> None:
    made, x = layer(), pictures(2, 3, 8, 8)
    np.testing.assert_array_equal(made(x).data, op(made, x).data)


def test_batch_norm_hands_on_its_options() -> None:
    layer, x = nn.BatchNorm2d(3, eps=0.5, momentum=0.4, relu=True), pictures(2, 3, 4, 4)
    running = np.zeros(3, "float32"), np.ones(3, "float32")
    y = ops.batch_norm(x, layer.gamma, layer.beta, *running, training=True, momentum=0.4, eps=0.5, relu=True)
    np.testing.assert_array_equal(layer(x).data, y.data)
    np.testing.assert_array_equal(layer.running_var.data, running[1])


def test_batch_norm_starts_as_the_identity() -> None:
    layer = nn.BatchNorm2d(3)
    values = [tensor.data.tolist() for tensor in (layer.gamma, layer.beta, layer.running_mean, layer.running_var)]
    assert values == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(0, 4, 3), "Conv2d: in_channels must be an int of at least 1, got 0"),
        (lambda: nn.Conv2d(3, 4.0, 3), "Conv2d: out_channels must be an int of at least 1, got 4.0"),  # type: ignore
        (lambda: nn.Linear(3, -1), "Linear: out_features must be an int of at least 1, got -1"),
        (lambda: nn.BatchNorm2d(0), "BatchNorm2d: channels must be an int of at least 1, got 0"),
        (lambda: nn.Conv2d(3, 4, 0), "kernel_size"),
        (lambda: nn.Conv2d(4, 6, 3, groups=4), "Conv2d: 4 groups do not divide 4 → 6 channels"),
        (lambda: nn.Conv2d(4, 6, 3, groups=0), "Conv2d: groups must be an int of at least 1, got 0"),
        (lambda: nn.Conv2d(3, 4, (3, 3, 3)), "kernel_size"),  # type: ignore[arg-type]
    ],
)
def test_sizes_are_checked_when_a_layer_is_made(make: Callable[[], nn.Module], message: str) -> None:
    """Where the mistake is, and not where the first batch arrives."""
    with pytest.raises(ShapeError, match=message):
        make()


# ---- Dropout's numbers ----


def dropped(model: nn.Module, x: Tensor) -> Any:
    with no_grad():
        return model(x).numpy() == 0


def test_set_key_fixes_every_mask() -> None:
    """A step can be computed again, after a resume or for a gradient check, with the same masks."""
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))), Tensor(np.ones((4, 50)))
    model.set_key(Key(1))
    first = dropped(model, x)
    np.testing.assert_array_equal(dropped(model, x), first)
    model.set_key(Key(2))
    assert (dropped(model, x) != first).any()


def test_layers_get_masks_of_their_own() -> None:
    """With one mask for all, two dropouts of one half in a row would drop no more than one."""
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), Tensor(np.ones((4, 500)))
    model.set_key(Key(1))
    assert abs(dropped(model, x).mean() - 0.75) < 0.05


def test_set_key_hands_on_the_rows() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5)), Tensor(np.ones((3, 50)))
    model.set_key(Key(1), rows=np.array([7, 8, 9]))
    first = dropped(model, x)
    model.set_key(Key(1), rows=np.array([9, 7, 8]))
    np.testing.assert_array_equal(dropped(model, x), first[[2, 0, 1]])


def test_without_a_key_every_call_draws_anew() -> None:
    """And two layers differ, so that a quick experiment needs no keys."""
    one, two, x = nn.Dropout(0.5), nn.Dropout(0.5), Tensor(np.ones((4, 50)))
    masks = [dropped(layer, x) for layer in (one, one, two)]
    assert (masks[0] != masks[1]).any()
    assert (masks[0] != masks[2]).any()
    assert (masks[1] != masks[2]).any()


def test_dropout_rests_in_evaluation() -> None:
    x = Tensor(np.ones((4, 50)))
    assert nn.Dropout(0.5).eval()(x) is x


def test_a_dropout_that_drops_everything_is_refused() -> None:
    with pytest.raises(MinigradError, match=r"from 0 to below 1, got 1\.0"):
        nn.Dropout(1.0)


# ---- What weights start from ----


def filled(fill: Callable[..., None], *args: Any, shape: tuple[int, ...] = (50, 40, 5, 5)) -> np.ndarray:
    weight = np.empty(shape, "float32")
    fill(weight, Key(3), *args)
    return weight.astype("float64")


@pytest.mark.parametrize(
    ("fill", "args", "std", "bound"),
    [
        (init.normal_, (0.3,), 0.3, math.inf),
        (init.uniform_, (0.3,), 0.3 / math.sqrt(3), 0.3),
        (init.truncated_normal_, (0.3,), 0.3 * 0.879626, 0.6),  # the standard deviation after truncation at 2
        (init.he_normal_, (), math.sqrt(2 / 1000), math.inf),
        (init.xavier_uniform_, (), math.sqrt(1 / 1000), math.sqrt(3 / 1000)),
        (init.glorot_uniform_, (), math.sqrt(2 / (1000 + 1250)), math.sqrt(6 / (1000 + 1250))),
        (init.torch_default_, (1000,), math.sqrt(1 / 3000), math.sqrt(1 / 1000)),
    ],
)
def test_initialisers_have_their_moments(fill: Any, args: Any, std: float, bound: float) -> None:
    """50,000 numbers: the standard error of their mean is std/223, of their deviation less than std/316."""
    w = filled(fill, *args)
    assert abs(w.mean()) < 5 * std / math.sqrt(w.size)
    assert w.std() == pytest.approx(std, rel=0.02)
    assert np.abs(w).max() <= bound * (1 + 1e-6)
    assert np.abs(w).max() > min(bound * 0.999, 3 * std)  # … and the bound is used


def test_a_truncated_normal_is_redrawn_not_clipped() -> None:
    """Clipping would pile up five percent of the weights at the ends."""
    w = np.abs(filled(init.truncated_normal_, 1.0))
    assert (w > 1.999).mean() < 0.001


@pytest.mark.parametrize(("layer", "fan"), [(lambda: nn.Conv2d(10, 500, 5), 250), (lambda: nn.Linear(250, 500), 250)])
def test_layers_start_as_in_torch(layer: Callable[[], Any], fan: int) -> None:
    made = layer()
    for tensor in (made.weight, made.bias):
        assert 0.98 < np.abs(tensor.data).max() * math.sqrt(fan) <= 1 + 1e-6
    assert np.corrcoef(made.weight.data.ravel()[:500], made.bias.data)[0, 1] < 0.2


def test_every_backend_starts_from_the_same_weights(xp: Any) -> None:
    """A network that is moved to the GPU starts where it did on the host."""
    with seeded(4):
        state = Net().state_dict()
    expected = np.empty((4, 3, 3, 3), "float32")
    with seeded(4):
        init.torch_default_(expected, next_key().fold("weight"), 27)
    np.testing.assert_array_equal(state["stem.weight"], expected)


def test_construction_is_seeded() -> None:
    def built(seed: int) -> dict[str, np.ndarray]:
        with seeded(seed):
            return Net().state_dict()

    one, again, other = built(1), built(1), built(2)
    assert all((one[name] == again[name]).all() for name in one)
    assert (one["stem.weight"] != other["stem.weight"]).any()
    assert (one["head.weight"] != other["head.weight"]).any()


def test_layers_of_one_shape_start_differently() -> None:
    """Equal layers would learn the same."""
    with seeded(1):
        one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    assert (one.weight.data != two.weight.data).all()


def test_a_layer_outside_the_tree_does_not_erase_the_path() -> None:
    """A walk does not enter closures: the closure's owner cannot name the layer, and must not unname it."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            hidden = nn.Sequential(nn.Conv2d(3, 4, 1))
            self.call = lambda x: hidden(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)

    with pytest.raises(ShapeError, match=r"^0: conv2d got an input of shape \(1, 5, 2, 2\)"):
        Holder()(Tensor(np.zeros((1, 5, 2, 2), np.float32)))


def test_a_state_that_is_no_number_changes_nothing() -> None:
    layer = nn.Linear(2, 3)
    before = layer.state_dict()
    state = {"weight": np.ones((3, 2)), "bias": np.array(["a", "b", "c"])}
    with pytest.raises(StateError, match="not a number"):
        layer.load_state_dict(state)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


# ---- Units that run as one op ----


def unit(i: int, o: int, kernel: int = 1, *, eps: float = 1e-5, groups: int = 1) -> nn.ConvNormReLU:
    """A unit whose batch norm is no identity, in float64."""
    made = nn.ConvNormReLU(
        nn.Conv2d(i, o, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(o, eps=eps, relu=True)
    )
    norm = made.batchnorm
    for tensor in (norm.gamma, norm.beta, norm.running_mean, norm.running_var):
        tensor.data[...] = asarray(normal(next_key(), (o,)).astype("float32") ** 2)
    made.astype("float64")
    return made


def plain(x: Tensor, branches: nn.Branches) -> Tensor:
    """Every branch by itself, every unit by its parts."""

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.ConvNormReLU):
            return layer.batchnorm(layer.conv(x))
        if isinstance(layer, nn.Sequential):
            for _, child in layer.children():
                x = run(child, x)
            return x
        return layer(x)

    return ops.concat([run(branch, x) for _, branch in branches.children()])


BRANCHES: dict[str, Callable[[], list[nn.Module]]] = {
    "one unit": lambda: [unit(4, 3), nn.MaxPool2d(3, 1, 1)],
    "units alone and in chains": lambda: [
        nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(4, 2)),
        nn.Sequential(unit(4, 5), unit(5, 3, 3)),
        unit(4, 3),
        nn.Sequential(unit(4, 2), nn.Dropout(0), unit(2, 2, 5)),
        unit(4, 2, 3),
    ],
    "of two kinds": lambda: [unit(4, 3), unit(4, 2, eps=1e-3), unit(4, 2)],
    "of groups": lambda: [unit(4, 6, groups=2), unit(4, 2)],
    "nothing but the input": lambda: [nn.Sequential(), unit(4, 3), unit(4, 2)],
    "a fork": lambda: [unit(4, 3), nn.Sequential(unit(4, 2), nn.Branches(unit(2, 1), unit(2, 2)))],
}


@pytest.mark.parametrize("mode", ["train", "eval", "eval, with gradients"])
@pytest.mark.parametrize("make", BRANCHES.values(), ids=list(BRANCHES))
def test_branches_are_their_parts(xp: Any, make: Callable[[], list[nn.Module]], mode: str) -> None:
    """Values, gradients and running statistics, though units that see the same input run as one op."""
    results = []
    for compute in (lambda b, x: b(x), lambda b, x: plain(x, b)):
        with seeded(5):
            branches = nn.Branches(*make())
        branches.train(mode == "train")
        x = Tensor(asarray(normal(Key(1), (2, 4, 5, 6))))
        if mode == "eval":
            with no_grad():
                y = compute(branches, x)
            results.append({"y": to_host(y.data)})
            continue
        x.requires_grad = True
        y = compute(branches, x)
        y.backward(asarray(normal(Key(2), y.shape)))
        gradients = {name: to_host(p.grad) for name, p in branches.named_parameters()}
        results.append({"y": to_host(y.data), "x": to_host(x.grad), **gradients, **branches.state_dict()})
    assert results[0].keys() == results[1].keys()
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_mistake_in_one_of_several_units_is_located() -> None:
    branches = nn.Branches(left=unit(4, 3), right=nn.Sequential(unit(5, 2)))
    with pytest.raises(ShapeError, match=r"^right\.0\.conv: conv2d got an input of shape \(2, 4, 3, 3\)"):
        branches(Tensor(normal(Key(0), (2, 4, 3, 3))))


def test_freeze() -> None:
    """What is frozen gets no gradient and keeps its running statistics, whatever mode the model is put in."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert model[0].freeze() is model[0]
    model.train()
    assert (model.training, model[0].training, model[0][1].training) == (True, False, False)
    before = {name: tensor.copy() for name, tensor in model.state_dict().items()}
    x = Tensor(np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype("float32"))
    ops.cross_entropy(model(x), np.array([0, 1])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]
    optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1).step()
    changed = [name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()]
    assert changed == ["3.weight", "3.bias"]


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (
            lambda: nn.Sequential([nn.ReLU()]),
            r"Sequential is made of modules, got a list as '0': write Sequential\(",
        ),
        (lambda: nn.Sequential(nn.ReLU(), nn.ReLU), "Sequential is made of modules, got the class itself as '1'"),
        (lambda: nn.Branches(pool=ops.relu), "Branches is made of modules, got a function as 'pool'"),
        (lambda: nn.Dropout(50), "from 0 to below 1, got 50"),
        (lambda: nn.Dropout("0.5"), "from 0 to below 1, got '0.5'"),  # type: ignore[arg-type]
        (lambda: nn.ReLU().set_key(3), r"set_key wants a key, as minigrad\.random\.Key\(seed\)\.fold\(step\), got int"),
        (lambda: nn.Linear(1, 1).astype("int32"), "a module's numbers are float32 or float64, got 'int32'"),
        (lambda: nn.Linear(1, 1).load_state_dict("w.npz"), r"as state_dict\(\) returns them, got str"),
        (lambda: nn.Linear(1, 1).load_state_dict(nn.Linear(1, 1)), r"as state_dict\(\) returns them, got Linear"),
    ],
)
def test_mistakes_are_explained(mistake: Callable[[], object], sentence: str) -> None:
    """A list, a function or a class among the layers would be passed over, and the network would be another."""
    with pytest.raises(MinigradError, match=sentence):
        mistake()


# ---- Moves ----


class Small(nn.Module):
    def __init__(self) -> None:
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, relu=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(ops.global_avg_pool2d(self.norm(self.conv(x))).flatten())


@pytest.mark.parametrize("xp", ["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_a_model_moves_there_and_back(xp: Any) -> None:
    """Parameters and buffers, channels-last memory, the same result; an optimizer from before says what to do."""
    pictures = np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype("float32")
    backend.set_backend("numpy")
    model = Small()
    before, expected = model.state_dict(), model(Tensor(pictures)).data
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    plain = SGD(model.parameters(), 0.1)
    average = Average(model, 0.9)
    assert model.to("cupy") is model
    assert model.to("cupy") is model
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert array_module(tensor.data) is xp
        assert tensor.grad is None
    weight = model.conv.weight.data
    assert weight.transpose(0, 2, 3, 1).flags.c_contiguous
    with pytest.raises(
        BackendError, match=rf"conv2d got an array of numpy \(2, 3, 5, 5\) and one of {xp.__name__} \(4, 3, 3, 3\)"
    ):
        model(Tensor(pictures))
    backend.set_backend("cupy")
    logits = model(Tensor(asarray(pictures)))
    np.testing.assert_allclose(to_host(logits.data), expected, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    with pytest.raises(
        BackendError, match=r"SGD: parameter 0 \(4, 3, 3, 3\) is an array of \w*cupy, its velocity .* numpy"
    ):
        optimizer.step()
    np.testing.assert_array_equal(to_host(model.conv.weight.data), before["conv.weight"])
    plain.step()  # it keeps nothing
    assert not np.array_equal(to_host(model.conv.weight.data), before["conv.weight"])
    with pytest.raises(BackendError, match="weights have moved to another backend since their average began"):
        average.update(0)
    again = SGD(model.parameters(), 0.1, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(again.state_dict())
    model.load_state_dict(before)
    model.to("numpy")
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert isinstance(model.conv.weight.data, np.ndarray)
    with pytest.raises(BackendError, match="there is no backend 'cuda': choose from numpy, cupy"):
        model.to("cuda")


def test_a_model_stays_where_it_is_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    model = Small()
    with pytest.raises(BackendError, match="the backend 'cupy' cannot be used here: CuPy is not installed"):
        model.to("cupy")
    assert isinstance(model.conv.weight.data, np.ndarray)
