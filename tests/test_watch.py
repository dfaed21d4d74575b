"""The watch names the layer, op and direction where NaN begins; layer_times adds up."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import minigrad
from inception.models import create_model
from inception.models.blocks import InceptionBlock
from minigrad import Tensor, backend, first_non_finite, layer_times, nn, no_grad, ops, record, watch
from minigrad.errors import MinigradError, NonFiniteError, ShapeError
from minigrad.layout import Array
from minigrad.nn.module import observer
from minigrad.random import Key, normal, seeded
from minigrad.tensor import watcher
from minigrad.watch import Event, each_op, untouched

NAN, INF = float("nan"), float("inf")


class Scale(nn.Module):
    """Own op: passes values on, and gradients with `factor` in one place of them."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        def backward(dy: Array) -> Array:
            dx = dy.copy("K")
            dx[(0,) * dx.ndim] *= self.factor
            return dx

        return record("scale", x.data, (x,), backward)


class Net(nn.Module):
    """Branches that are joined, then two heads."""

    def __init__(self) -> None:
        with seeded(1):
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.block = nn.Branches(
                left=nn.Sequential(nn.Conv2d(4, 2, 1), Scale(), nn.BatchNorm2d(2, relu=True)),
                right=nn.Sequential(nn.MaxPool2d(3, 1, 1), Scale(), nn.Conv2d(4, 3, 1)),
            )
            self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
            self.head = nn.Linear(5, 3)
            self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.flatten(self.pool(self.block(self.stem(x))))
        return self.head(x), self.fc(x)


def pictures(n: int = 2) -> Tensor:
    return Tensor(backend.asarray(normal(Key(2), (n, 3, 6, 6)).astype("float32")))


def step(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """A training step without the update. Returns the loss."""
    x = pictures() if x is None else x
    labels = backend.asarray(np.arange(len(x)))
    losses = [ops.cross_entropy(logits, labels) for logits in model(x)]
    loss = sum(losses[1:], start=losses[0])
    loss.backward()
    return loss


def caught(model: nn.Module, x: Tensor | None = None) -> str:
    with pytest.raises(NonFiniteError) as error, watch(model):
        step(model, x)
    return str(error.value)


# ---- A healthy step ----


def test_a_healthy_step_passes_and_every_op_is_checked(xp: Any) -> None:
    model = Net()
    with watch(model) as checked:
        watched = step(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    # stem, 3 + 3 in the branches, concat, pool, flatten, two heads, two losses, their sum
    assert checked == {"forward": 15, "backward": 15}
    model.zero_grad()
    assert step(model).item() == watched.item()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad == gradient).all()


def test_nothing_is_seen_after_the_block(xp: Any) -> None:
    model = Net()
    with pytest.raises(ShapeError), watch(model):  # whatever ends it
        model(Tensor(np.zeros((1, 4, 6, 6), np.float32)) if xp is np else Tensor(xp.zeros((1, 4, 6, 6), "float32")))
    assert observer.get() is None
    assert watcher.get() is None


def test_watching_keeps_no_array_longer(xp: Any) -> None:
    """What backward does not need is freed, as without the watch: a wrapper that held inputs would double memory."""
    model = Net()
    with watch(model):
        x = model.stem(pictures())
        y = ops.relu(x)  # keeps its result only
        lives = weakref.ref(x)
        del x
        gc.collect()
        assert lives() is None
        y.sum().backward()


# ---- A planted NaN ----


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("path", "op"),
    [("stem", "conv2d"), ("block.left.0", "conv2d"), ("block.right.2", "conv2d"), ("head", "linear"), ("fc", "linear")],
)
def test_a_broken_weight_is_named(xp: Any, path: str, op: str, value: float) -> None:
    model = Net()
    layer = dict(model.named_modules())[path]
    layer.bias.data[1] = value
    said = caught(model)
    kind = "NaN" if np.isnan(value) else "Inf"
    assert said.startswith(f"{path}: {op} (forward): its output (2, ")
    assert f"{path}.bias ({len(layer.bias)},) (1 {kind} among {len(layer.bias)} values, the rest between" in said
    assert "input 0 (2, " in said
    assert "(finite, between" in said
    assert "the weights were broken before this step" in said
    assert "optim.clip_by_norm" in said


def test_counts_and_ranges_are_right() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    layer[0].weight.data[...], layer[0].bias.data[...] = [[1, 0], [0, 1]], 0
    with pytest.raises(NonFiniteError) as error, watch(layer):
        layer(Tensor([[NAN, 1.5], [2.0, INF], [-3.0, 4.0]]))
    said = str(error.value)
    assert "input 0 (3, 2) (1 NaN and 1 Inf among 6 values, the rest between -3 and 4)" in said
    assert "0.weight (2, 2) (finite, between 0 and 1)" in said
    assert "its output (3, 2) (3 NaN and 1 Inf among 6 values, the rest between -3 and 4)" in said


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_picture_is_named_by_the_first_layer(xp: Any, value: float) -> None:
    x = pictures()
    x.data[1, 2, 3, 4] = value
    said = caught(Net(), x)
    assert said.startswith("stem: conv2d (forward)")
    assert f"input 0 (2, 3, 6, 6) (1 {'NaN' if np.isnan(value) else 'Inf'} among 216 values" in said
    assert "check the pictures" in said


def test_an_op_that_overflows_is_named_with_its_range(xp: Any) -> None:
    model = Net()
    model.block.right[2].weight.data[...] = 3e38
    said = caught(model)
    assert said.startswith("block.right.2: conv2d (forward)")
    assert "block.right.2.weight (3, 4, 1, 1) (finite, between 3e+38 and 3e+38)" in said
    assert "conv2d itself overflowed or left its domain: try a lower learning rate" in said


@pytest.mark.parametrize("path", ["block.left.1", "block.right.1"])
def test_a_broken_backward_is_named(xp: Any, path: str) -> None:
    model = Net()
    dict(model.named_modules())[path].factor = NAN
    said = caught(model)
    assert said.startswith(f"{path}: scale (backward): its gradient of input 0 (2, ")
    assert "1 NaN among" in said
    assert "made from gradient (2, " in said
    assert "gradcheck if scale is your own op" in said


def test_the_gradient_of_a_weight_is_named() -> None:
    """Finite gradients of pictures, but a weight's gradient that overflows in float32."""
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data[...] = 0
    with (
        pytest.raises(NonFiniteError, match=r"^0: linear \(backward\): its gradient of 0\.weight \(1, 2\)"),
        watch(model),
    ):
        (model(Tensor(np.full((2, 2), 3e38, np.float32))) * 3.0).sum().backward()


def test_a_gradient_that_overflows_where_branches_meet_is_told_apart(xp: Any) -> None:
    model, user = Net(), Scale(3e38)
    y = model.stem(pictures())

    def run() -> None:
        x = model.block.left[1](y)  # each of its two users sends a finite gradient, their sum is Inf
        (user(x) + user(x)).sum().backward()

    with pytest.raises(NonFiniteError) as error, watch(model):
        run()
    assert str(error.value).startswith("block.left.1: scale (backward)")
    assert "the gradient came in broken" in str(error.value)


def test_a_gradient_that_nobody_needs_is_not_checked() -> None:
    """multiply hands back both gradients; that of the constant, 10 · 3e38, goes nowhere."""
    x = Tensor([3e38], requires_grad=True)
    with watch(nn.ReLU()) as checked:
        (x * Tensor([1e-38]) * 10.0).sum().backward()
    assert checked["backward"] == 3
    assert x.grad is not None


def test_the_first_of_several_is_named() -> None:
    """Forward, that is the earlier layer; a head that is broken too comes later."""
    model = Net()
    for layer in (model.fc, model.block.right[2], model.head):
        layer.bias.data[0] = NAN
    assert caught(model).startswith("block.right.2: conv2d (forward)")


def test_backward_the_later_layer_comes_first() -> None:
    """The gradient arrives at the right branch's end before its start, whichever was built first."""
    model = Net()
    model.block.right.late = Scale(INF)  # after the convolution
    model.block.right[1].factor = NAN
    assert caught(model).startswith("block.right.late: scale (backward)")


def test_one_head_of_googlenet() -> None:
    model = create_model("googlenet_small", aux_logits=True)
    model.aux1.fc1.weight.data[7, 3] = NAN
    x = Tensor(normal(Key(0), (2, 3, 16, 16)).astype("float32"))
    assert caught(model, x).startswith("aux1.fc1: linear (forward)")


def test_the_loss_is_outside_the_model() -> None:
    model = Net()
    with pytest.raises(NonFiniteError, match=r"^outside the model: log \(forward\)"), watch(model):
        (model(pictures())[0] * 0.0).log()


def test_an_op_of_the_model_itself_and_of_a_layer_without_a_path() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            self.bias = nn.Parameter(np.float32([NAN]))
            hidden = nn.Sequential(nn.ReLU())
            self.hidden = lambda x: hidden(x)  # a walk does not enter closures

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden(x) + self.bias

    model = nn.Sequential(Held())
    with pytest.raises(NonFiniteError, match=r"^0: add \(forward\).*0\.bias"), watch(model):
        model(pictures())
    with pytest.raises(NonFiniteError, match=r"^0: relu \(forward\)"), watch(model):
        model(Tensor([NAN]))
    with pytest.raises(NonFiniteError, match=r"^\(model\): add \(forward\)"), watch(model[0]):
        model[0](pictures())


def test_paths_are_those_of_the_watched_model() -> None:
    """Also where a part of it is called by itself, whose own paths are shorter."""
    model = Net()
    model.block.right[2].bias.data[0] = NAN
    with pytest.raises(NonFiniteError) as error, watch(model):
        model.block.right(model.stem(pictures()))
    assert error.value.layer_path == "block.right.2"
    assert isinstance(error.value, MinigradError)


def test_numpys_own_warnings_do_not_come_first() -> None:
    """They are errors in this suite: a division by zero must be named, not warned of."""
    with pytest.raises(NonFiniteError, match=r"divide \(forward\)"), watch(nn.ReLU()):
        1.0 / Tensor([0.0, 1.0])


def test_threads_agree_on_the_layer() -> None:
    before = minigrad.num_threads()
    model = create_model("googlenet_small")
    model.inception3a.branch3[1].conv.weight.data[...] = NAN
    x = Tensor(normal(Key(0), (8, 3, 32, 32)).astype("float32"))
    try:
        minigrad.set_num_threads(2)
        with pytest.raises(NonFiniteError, match=r"^inception3a\.branch3\.1: conv_bn_relu"), watch(model):
            model(x)
    finally:
        minigrad.set_num_threads(before)


# ---- Layers that run as one op ----


def joint() -> tuple[nn.Module, Tensor]:
    """A block whose three 1×1 units run as one op (nn.together), and its input, which needs a gradient."""
    with seeded(3):
        block = InceptionBlock(5, 2, 3, 4, 2, 3, 2)
    x = Tensor(backend.asarray(normal(Key(4), (2, 5, 6, 6)).astype("float32")))
    x.requires_grad = True
    return block, x


@pytest.mark.parametrize("where", ["conv.weight", "conv.bias", "batchnorm.gamma", "batchnorm.beta"])
@pytest.mark.parametrize("unit", ["branch1", "branch2.0", "branch3.0"])
def test_a_broken_parameter_of_one_of_several_units_is_named(xp: Any, unit: str, where: str) -> None:
    block, x = joint()
    parameter = dict(block.named_parameters())[f"{unit}.{where}"]
    parameter.data[(0,) * parameter.ndim] = NAN
    training = where != "conv.bias"  # a bias that batch norm takes off again shows in evaluation alone
    with pytest.raises(NonFiniteError) as error, watch(block), nullcontext() if training else no_grad():
        block.train(training)(x).sum()
    said = str(error.value)
    assert said.startswith(f"{unit}: conv_bn_relu (forward): its output")
    assert f"{unit}.{where} {parameter.shape} (1 NaN among {parameter.size} values" in said
    assert "input 0 (2, 5, 6, 6) (finite" in said
    others = {"branch1", "branch2.0", "branch3.0"} - {unit}
    assert not any(f"{other}." in said for other in others)  # only what it was made from itself


def test_one_of_several_units_in_a_whole_network() -> None:
    model = create_model("googlenet_small")
    model.inception3a.branch2[0].batchnorm.gamma.data[1] = INF
    with pytest.raises(NonFiniteError, match=r"^inception3a\.branch2\.0: conv_bn_relu \(forward\)"), watch(model):
        model(Tensor(normal(Key(0), (2, 3, 16, 16)).astype("float32")))


@pytest.mark.parametrize("broken", [0, 1, 2])
@pytest.mark.parametrize("others", [True, False])
def test_the_unit_with_a_broken_gradient_is_named(xp: Any, broken: int, others: bool) -> None:
    """Though the gradient of the input, which is that of all units together, is broken too."""
    paths = ["branch1", "branch2.0", "branch3.0"]
    block, x = joint()

    def run() -> None:
        results = nn.together(x, *(dict(block.named_modules())[path] for path in paths))
        parts = [broken_above(y) if i == broken else y for i, y in enumerate(results)]
        parts = [y.sum() for i, y in enumerate(parts) if others or i == broken]
        sum(parts[1:], start=parts[0]).backward()

    with pytest.raises(NonFiniteError) as error, watch(block):
        run()
    said = str(error.value)
    assert said.startswith(f"{paths[broken]}: conv_bn_relu (backward): its gradient of {paths[broken]}.conv.weight")
    assert "the gradient came in broken" in said


def broken_above(y: Tensor) -> Tensor:
    """y, whose gradient is handed on as NaN without any op that the watch could blame."""
    token = watcher.set(None)
    try:
        return record("unseen", y.data, (y,), lambda dy: dy * np.float32(NAN))
    finally:
        watcher.reset(token)


def test_the_gradient_of_what_several_units_share_is_their_blocks(xp: Any) -> None:
    """Each unit has its own parameters' gradients, and an event after them the gradient of their input."""
    block, x = joint()
    events: list[Event] = []
    with each_op(block, events.append):
        block(x).sum().backward()
    back = [e for e in events if e.op == "conv_bn_relu" and e.direction == "backward"]
    assert [e.path for e in back[-4:]] == ["branch1", "branch2.0", "branch3.0", ""]
    for event in back[-4:-1]:
        names = ("conv.weight", "conv.bias", "batchnorm.gamma", "batchnorm.beta")
        assert [name for name, _ in event.outputs] == [f"{event.path}.{name}" for name in names]
        assert [name for name, _ in event.inputs] == ["gradient"]
        for name, gradient in event.outputs:
            assert gradient.shape == dict(block.named_parameters())[name].shape
    assert [(name, dx.shape) for name, dx in back[-1].outputs] == [("input 0", x.shape)]
    assert back[-1].seconds == 0


def test_times_of_units_that_run_as_one_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the common op is shared out by multiply-adds, forward and backward, and nothing is lost."""
    block, x = joint()
    plain = minigrad.kernels.kernels(x.data)
    slow = {name: getattr(plain, name) for name in ("conv2d_statistics", "conv_bn_relu_backward")}
    for name, kernel in slow.items():
        monkeypatch.setattr(plain, name, lambda *args, kernel=kernel: (time.sleep(0.02), kernel(*args))[1])
    units = [block.branch1, block.branch2[0], block.branch3[0]]
    with layer_times(block) as times, block.called():
        sum((y.sum() for y in nn.together(x, *units)), start=Tensor(0.0)).backward()
    rows = {row.path: row for row in times.rows if row.op == "conv_bn_relu"}
    assert list(rows) == ["branch1", "branch2.0", "branch3.0"]
    for direction in ("forward", "backward"):
        found = [getattr(row, direction) for row in rows.values()]
        assert 20 <= sum(found) < 40
        np.testing.assert_allclose(np.divide(found, sum(found)), np.array([2, 3, 2]) / 7, rtol=1e-6)
    assert sum(row.share for row in times.rows) == pytest.approx(1)


# ---- The replay ----


def test_replay_names_the_layer_and_leaves_no_trace(xp: Any) -> None:
    model = Net()
    step(model)
    model.head.bias.data[2] = NAN
    gradients = [parameter.grad.copy() for parameter in model.parameters()]
    state = model.state_dict()
    error = first_non_finite(model, lambda: step(model))
    assert error is not None
    assert error.layer_path == "head"
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad == gradient).all()


def test_replay_of_a_healthy_step_finds_nothing_and_passes_other_errors_on() -> None:
    model = Net()
    ran: list[float] = []
    assert first_non_finite(model, lambda: ran.append(step(model).item())) is None
    assert len(ran) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError):
        first_non_finite(model, lambda: 1 // 0)


def test_untouched_puts_modes_back_after_an_error() -> None:
    model = Net()
    model.block.eval()
    modes = [module.training for _, module in model.named_modules()]
    with pytest.raises(ZeroDivisionError), untouched(model):
        model.train().set_key(1 // 0)
    assert [module.training for _, module in model.named_modules()] == modes


# ---- Events ----


def test_events_come_in_order_with_names(xp: Any) -> None:
    model = Net()
    events: list[Event] = []
    with each_op(model, events.append) as calls:
        step(model)
        step(model)
    assert calls.steps == 2
    once = events[: len(events) // 2]
    forward, back = once[:15], once[15:]
    assert {e.direction for e in forward} == {"forward"}
    assert {e.direction for e in back} == {"backward"}
    assert [(e.place, e.op) for e in forward] == [
        ("stem", "conv2d"),
        ("block.left.0", "conv2d"),
        ("block.left.1", "scale"),
        ("block.left.2", "batch_norm"),
        ("block.right.0", "max_pool2d"),
        ("block.right.1", "scale"),
        ("block.right.2", "conv2d"),
        ("block", "concat"),
        ("pool", "adaptive_avg_pool2d"),
        ("flatten", "reshape"),
        ("head", "linear"),
        ("fc", "linear"),
        *[("outside the model", op) for op in ("cross_entropy", "cross_entropy", "add")],
    ]
    order = {(e.path, e.op): i for i, e in enumerate(back)}
    assert order["fc", "linear"] < order["flatten", "reshape"] < order["block", "concat"] < order["stem", "conv2d"]
    assert order["block.right.2", "conv2d"] < order["block.right.0", "max_pool2d"] < order["stem", "conv2d"]
    stem = forward[0]
    assert [name for name, _ in stem.inputs] == ["input 0", "stem.weight", "stem.bias"]
    assert [x.shape for _, x in stem.inputs] == [(2, 3, 6, 6), (4, 3, 3, 3), (4,)]
    assert stem.module is model.stem
    assert stem.outputs[0][1].shape == (2, 4, 6, 6)
    assert stem.multiply_adds == 2 * 36 * 4 * 27
    # The pictures need no gradient. The engine adds up what it is handed, so these are the parameters' own.
    assert [name for name, _ in back[-1].outputs] == ["stem.weight", "stem.bias"]
    again = events[-1].outputs[0][1] + back[-1].outputs[0][1]
    np.testing.assert_allclose(backend.to_host(model.stem.weight.grad), backend.to_host(again), rtol=1e-6)


def test_without_a_graph_only_forward_is_seen() -> None:
    model = Net()
    events: list[Event] = []
    with each_op(model, events.append), minigrad.no_grad():
        model(pictures())
    assert [e.direction for e in events] == ["forward"] * 12


def test_a_tensor_that_is_used_twice_and_an_input_left_out() -> None:
    events: list[Event] = []
    layer = nn.Conv2d(1, 1, 1, bias=False)
    x = Tensor([2.0], requires_grad=True)
    with each_op(layer, events.append):
        (x * x).sum().backward()
        layer(Tensor(np.ones((1, 1, 1, 1), np.float32)))
    product, _, _, back, conv = events
    assert [name for name, _ in product.inputs] == ["input 0", "input 1"]
    assert [(name, dx.tolist()) for name, dx in back.outputs] == [("input 0", [2.0]), ("input 1", [2.0])]
    assert [name for name, _ in conv.inputs] == ["input 0", "weight"]


@pytest.mark.parametrize("wrong", [None, 3.0, [np.float32(1), np.float32(1)]])
def test_a_backward_that_returns_the_wrong_thing_is_left_to_the_engine(wrong: Any) -> None:
    x = Tensor([1.0], requires_grad=True)

    def run() -> str:
        try:
            record("own", x.data, (x,), lambda dy: wrong).sum().backward()
        except MinigradError as error:
            return str(error)
        return "nothing"

    plain = run()
    with watch(nn.ReLU()):
        assert run() == plain


# ---- Times ----


class Sleeper(nn.Module):
    """Takes a known time, forward and backward."""

    def __init__(self, forward: float, backward: float):
        self.seconds = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds[0])

        def backward(dy: Array) -> Array:
            time.sleep(self.seconds[1])
            return dy

        return record("sleep", x.data, (x,), backward)


def test_times_are_those_of_the_layer_and_per_step() -> None:
    model = nn.Sequential(Sleeper(0.004, 0.008), nn.Sequential(Sleeper(0.002, 0), Sleeper(0, 0.016)))
    x = Tensor([1.0], requires_grad=True)
    with layer_times(model) as times:
        for _ in range(3):
            time.sleep(0.05)  # waiting for a batch is nobody's time
            loss = model(x)
            time.sleep(0.05)
            loss.backward()
    rows = {row.path: row for row in times.rows}
    assert list(rows) == ["0", "1.0", "1.1"]
    assert {row.op for row in times.rows} == {"sleep"}
    for path, forward, back in (("0", 4, 8), ("1.0", 2, 0), ("1.1", 0, 16)):
        assert forward <= rows[path].forward < forward + 10  # a busy machine sleeps longer, never shorter
        assert back <= rows[path].backward < back + 10
    total = sum(row.forward + row.backward for row in times.rows)
    for row in times.rows:
        assert row.share == pytest.approx((row.forward + row.backward) / total)
    assert sum(row.share for row in times.rows) == pytest.approx(1)


def test_times_of_googlenet_fold_like_the_summary(xp: Any) -> None:
    model = create_model("googlenet_small", aux_logits=True)
    x = Tensor(backend.asarray(normal(Key(0), (2, 3, 16, 16)).astype("float32")))
    with layer_times(model) as times:
        step(model, x)
    with layer_times(model, depth=1) as folded:
        step(model, x)
    paths = [row.path for row in folded.rows]
    assert paths[:3] == ["conv1", "inception3a", "inception3b"]
    assert paths[-2:] == ["outside the model"] * 2  # the losses, and their sum
    assert {path.split(".")[0] for path in (row.path for row in times.rows)} == set(paths)
    assert {row.path: row.op for row in folded.rows}["aux2"] == "InceptionAux"
    assert all(row.forward > 0 for row in times.rows)
    assert sum(row.backward > 0 for row in times.rows) == len(times.rows)
    lines = str(times).splitlines()
    assert lines[0].split() == ["layer", "op", "forward", "ms", "backward", "ms", "share"]
    assert lines[-1].split()[0] == "total"
    assert lines[-1].endswith("100.0%")
    assert len(lines) == len(times.rows) + 2
    assert len({len(line) for line in lines}) == 1


def test_times_before_anything_ran() -> None:
    with layer_times(Net()) as times:
        pass
    assert times.rows == []
    assert str(times).splitlines()[-1].split()[0] == "total"
