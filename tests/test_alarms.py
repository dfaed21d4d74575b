"""Alarms fire when they should, once, and are silent on a healthy run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from inception.models import create_model
from inception.training.alarms import Watchdog, dead_layers, exploding, no_better_than_guessing, slow_loader
from minigrad import Tensor, backend, nn, ops, optim
from minigrad.random import Key, normal, seeded

LN10 = math.log(10)


@pytest.mark.parametrize("loss", [LN10, 0.985 * LN10, 1.02 * LN10, 1.5 * LN10])
def test_a_head_at_chance_is_named(loss: float) -> None:
    found = no_better_than_guessing({"loss": 1.1, "aux1": loss}, 10, 400)
    assert list(found) == ["aux1 at chance"]
    assert f"aux1 is {loss:.4f} after 400 steps" in found["aux1 at chance"]
    assert "ln 10 = 2.3026" in found["aux1 at chance"]


@pytest.mark.parametrize(
    ("loss", "classes", "steps"),
    [
        (0.97 * LN10, 10, 10_000),  # it learns
        (LN10, 10, 199),  # too early to say
        (math.log(1000), 1000, 4999),  # many classes take longer
        (0.0, 1, 10_000),  # one class: there is nothing to learn, ln 1 = 0
        (math.nan, 10, 10_000),  # the other alarm's
    ],
)
def test_silent_where_it_learns_or_it_is_too_early(loss: float, classes: int, steps: int) -> None:
    assert no_better_than_guessing({"loss": loss}, classes, steps) == {}


@pytest.mark.parametrize(
    ("loss", "first", "lowest", "fires"),
    [
        (4.7, 2.3, 2.0, True),  # above twice the start
        (4.5, 2.3, 2.0, False),
        (1.3, 2.4, 0.1, True),  # tenfold, and back at half the start
        (1.1, 2.4, 0.1, False),
        (0.2, 2.4, 0.01, False),  # tenfold, of next to nothing
        (1.3, 2.4, 0.2, False),
        (1.5, 0.6, 0.55, False),  # resumed: its start is not where training began
        (4.7, 0.6, 0.55, True),
        (6.0, 3.5, 2.0, False),  # an unlucky start
        (9.5, 9.5, 9.5, False),  # the first mean came after the explosion, and was told in other words
        (9.6, 9.5, 9.5, True),
        (math.inf, 2.3, 2.0, True),
        (math.nan, 2.3, 2.0, True),
    ],
)
def test_exploding(loss: float, first: float, lowest: float, fires: bool) -> None:
    found = exploding({"aux2": loss}, {"aux2": first}, {"aux2": lowest}, 10)
    assert bool(found) == fires
    for sentence in found.values():
        assert sentence.startswith("aux2 ")
        assert ("first_non_finite" in sentence) == (not math.isfinite(loss))


def test_a_loss_that_falls_does_not_explode() -> None:
    """However far above guessing it began: that is said once, and in other words."""
    dog = Watchdog(2)
    (said,) = dog.look(10, {"loss": 4.0})
    assert said.startswith("loss is 4, far above what guessing gives (ln 2 = 0.6931)")
    assert dog.look(20, {"loss": 3.0}) == []
    assert dog.look(30, {"loss": 3.5}) == []  # a wobble below its start
    (said,) = dog.look(40, {"loss": 4.5})
    assert said.startswith("loss has grown to 4.5 (it started at 4, its lowest was 3)")


def test_slow_loader() -> None:
    assert "waited 3.0 s of 10.0 s (30%)" in slow_loader(3, 10)["slow loader"]
    assert slow_loader(2, 10) == {}  # 20 % is the limit
    assert slow_loader(4, 4.9) == {}  # the first batch has to be waited for
    assert slow_loader(0, 0) == {}


class Net(nn.Module):
    """A ReLU of each kind: a layer's own, and in one pass with batch norm; and a layer that is zero without one."""

    def __init__(self) -> None:
        with seeded(0):
            self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()
            self.norm = nn.BatchNorm2d(4, relu=True)
            self.last = nn.BatchNorm2d(4)
        self.last.gamma.data[...] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.relu(self.conv(x)) + x[:, :1]))


def pictures(n: int = 3) -> Tensor:
    return Tensor(backend.asarray(normal(Key(0), (n, 3, 5, 5)).astype("float32")))


def test_dead_layers(xp: Any) -> None:
    model = Net().eval()
    assert dead_layers(model, pictures()) == {}  # `last` is zero by its gamma, and has no ReLU
    model.conv.bias.data[...] = -100
    found = dead_layers(model, pictures())
    assert list(found) == ["relu dead"]
    assert "relu gives zero for all 3 pictures" in found["relu dead"]
    model.norm.beta.data[...] = -100
    assert list(dead_layers(model, pictures())) == ["relu dead", "norm dead"]
    model.norm.beta.data[2] = 100  # one channel lives
    model.conv.bias.data[1] = 0
    assert dead_layers(model, pictures()) == {}


def test_a_layer_that_lives_in_one_of_two_calls_is_alive() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x * x) + self.relu(x * x * -1.0)

    assert dead_layers(Twice(), pictures()) == {}


def test_looking_for_dead_layers_leaves_no_trace_and_reaches_the_heads() -> None:
    model = create_model("googlenet_small", aux_logits=True).eval()
    model.set_key(Key(5))
    model.aux2.fc1.bias.data[...] = -1000
    x = Tensor(normal(Key(0), (2, 3, 16, 16)).astype("float32"))
    before, logits = model.state_dict(), model(x).data
    assert list(dead_layers(model, x)) == ["aux2.relu dead"]
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert not model.training
    np.testing.assert_array_equal(model(x).data, logits)


def test_the_watchdog_says_each_thing_once() -> None:
    dog = Watchdog(10)
    assert dog.look(10, {"loss": 2.4, "aux1": 2.5}) == []
    assert [s.split()[0] for s in dog.look(300, {"loss": 1.2, "aux1": 2.3})] == ["aux1"]
    assert dog.look(400, {"loss": 1.1, "aux1": 2.3}) == []
    assert [s.split(" (")[0] for s in dog.look(500, {"loss": 9.0, "aux1": 2.0})] == ["loss has grown to 9"]
    assert "started at 2.4, its lowest was 1.1" in " ".join(after({"loss": 2.4}, {"loss": 1.1}, {"loss": 9.0}))
    assert dog.look(600, {"loss": 9.0, "aux1": 2.0}) == []
    assert [s.split(":")[0] for s in dog.look(700, {"loss": math.nan, "aux1": 2.0})] == ["loss is nan"]
    assert len(dog.look(800, {"loss": 1.0}, waited=5, seconds=20)) == 1
    assert dog.look(900, {"loss": 1.0}, waited=6, seconds=21) == []
    model = Net()
    assert dog.look_at_layers(model, pictures()) == []
    model.conv.bias.data[...] = -100
    assert len(dog.look_at_layers(model, pictures())) == 1
    assert dog.look_at_layers(model, pictures()) == []


def after(*looks: dict[str, float]) -> list[str]:
    dog = Watchdog(10)
    return [dog.look(10 * i, losses) for i, losses in enumerate(looks, 1)][-1]


def test_a_loss_that_is_never_finite_has_no_lowest() -> None:
    dog = Watchdog(10)
    assert len(dog.look(1, {"loss": math.nan})) == 1
    assert dog.look(2, {"loss": 2.3}) == []


@pytest.mark.parametrize("lr", [0.05, 0.0, 5.0])
def test_real_runs(lr: float) -> None:
    """Silent on a healthy one; and one that does not learn, or learns too fast, is told what it does."""
    n, batch = 96, 8
    x, labels = normal(Key(1), (n, 3, 6, 6)).astype("float32"), np.arange(n) % 10
    x[:, 0] += labels[:, None, None] / 3
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, relu=True), nn.Flatten(), nn.Linear(128, 10))
    optimizer = optim.SGD(model.parameters(), lr)
    dog, said = Watchdog(10), []
    for epoch in range(20):
        losses = []
        for start in range(0, n, batch):
            loss = ops.cross_entropy(model(Tensor(x[start : start + batch])), labels[start : start + batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        said += dog.look(len(losses) * (epoch + 1), {"loss": float(np.mean(losses))}, waited=0.1, seconds=10)
        said += dog.look_at_layers(model, Tensor(x[:batch]))
    if lr == 0.05:
        assert np.mean(losses) < 1
        assert said == []
    elif lr == 0:
        assert len(said) == 1
        assert "no better than guessing" in said[0]
    else:
        assert any("gives zero for all 8 pictures" in sentence or "no better than" in sentence for sentence in said)
