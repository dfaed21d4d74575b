"""Schedules against PyTorch's schedulers, at points known in closed form, and as functions."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrad.errors import MinigradError
from minigrad.schedule import (
    Schedule,
    constant,
    cosine,
    milestones,
    one_cycle,
    one_cycle_momentum,
    poly,
    step_decay,
    warm_up,
)

lengths = st.integers(1, 2000)
parts = st.floats(0.0, 1.0)
anneals = settings(deadline=None, max_examples=100)


def torch_values(build: Callable[[Any, Any], Any], steps: int) -> list[tuple[float, float]]:
    """Learning rate and momentum that a torch scheduler sets for each step."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants optimizer.step() first
        scheduler = build(torch.optim.lr_scheduler, optimizer)
        for step in range(steps):
            values.append((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["momentum"])))
            if step < steps - 1:
                scheduler.step()
    return values


@pytest.mark.parametrize("total", [8 * 390, 1000, 101, 10, 5, 2])
@pytest.mark.parametrize("peak_at", [0.3, 0.25, 0.5, 1.0])
def test_one_cycle_is_torchs(total: int, peak_at: float) -> None:
    if peak_at * total == 1.0:
        pytest.skip("torch divides by zero where the peak is the first step")
    expected = torch_values(
        lambda schedulers, optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=total, pct_start=peak_at), total
    )
    rate, momentum = one_cycle(total, peak_at), one_cycle_momentum(total, peak_at)
    for step, (lr, m) in enumerate(expected):
        assert 0.1 * rate(step) == pytest.approx(lr, rel=1e-15, abs=1e-16)
        assert momentum(step) == pytest.approx(m, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("schedule", "build"),
    [
        (cosine(50), lambda s, o: s.CosineAnnealingLR(o, 50)),
        (cosine(50, floor=0.1), lambda s, o: s.CosineAnnealingLR(o, 50, eta_min=0.01)),
        (step_decay(8, 0.96), lambda s, o: s.StepLR(o, 8, gamma=0.96)),
        (poly(50, 0.5), lambda s, o: s.PolynomialLR(o, 50, power=0.5)),
        (constant(), lambda s, o: s.ConstantLR(o, factor=1.0)),
    ],
)
def test_the_others_are_torchs(schedule: Schedule, build: Callable[[Any, Any], Any]) -> None:
    for step, (lr, _) in enumerate(torch_values(build, 51)):
        assert 0.1 * schedule(step) == pytest.approx(lr, rel=1e-12, abs=1e-15)


def test_the_accuracy_anchors_numbers() -> None:
    total = 8 * 390
    rate, momentum = one_cycle(total), one_cycle_momentum(total)
    peak = 0.3 * total - 1
    assert peak == 935
    for step, lr, m in [(0, 0.004, 0.95), (935, 0.1, 0.85), (total - 1, 4e-7, 0.95)]:
        assert 0.1 * rate(step) == pytest.approx(lr, rel=1e-12)
        assert momentum(step) == pytest.approx(m, rel=1e-12)


def test_points_in_closed_form() -> None:
    assert [constant()(step) for step in (0, 10**9)] == [1.0, 1.0]
    assert [step_decay(3, 0.5)(step) for step in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert [poly(4, 1.0)(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert poly(100, 0.5)(75) == 0.5
    assert [cosine(4, 0.2)(step) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert cosine(3)(1) == pytest.approx(0.75)
    # The peak of 11 steps at 6/11 is step 5, and both halves are half way after 2.5 steps.
    schedule = one_cycle(11, 6 / 11, start=0.2, end=0.1)
    assert [schedule(step) for step in (0, 5, 10, 11, 99)] == pytest.approx([0.2, 1.0, 0.1, 0.1, 0.1])
    assert (schedule(2) + schedule(3)) / 2 == pytest.approx(0.6)
    assert (schedule(7) + schedule(8)) / 2 == pytest.approx(0.55)
    assert [warm_up(constant(), 4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warm_up(step_decay(2, 0.5), 4)(step) for step in range(6)] == [0.25, 0.5, 0.375, 0.5, 0.25, 0.25]


@anneals
@given(lengths, parts)
def test_one_cycle_rises_and_falls(total: int, peak_at: float) -> None:
    rate, momentum = one_cycle(total, peak_at), one_cycle_momentum(total, peak_at)
    top = peak_at * total - 1
    for step in range(total - 1):
        if step + 1 <= top:
            assert rate(step) <= rate(step + 1)
            assert momentum(step) >= momentum(step + 1)
        elif step >= top:
            assert rate(step) >= rate(step + 1)
            assert momentum(step) <= momentum(step + 1)
    assert all(1 / 25e4 <= rate(step) <= 1.0 for step in range(total + 5))
    assert all(0.85 <= momentum(step) <= 0.95 for step in range(total + 5))


@anneals
@given(lengths, st.floats(0.1, 4.0), parts)
def test_decays_never_rise(total: int, power: float, floor: float) -> None:
    for schedule in (poly(total, power), cosine(total, floor), step_decay(total, floor), constant()):
        values = [schedule(step) for step in range(total + 5)]
        assert values[0] == 1.0
        assert all(a >= b for a, b in itertools.pairwise(values))
        assert all(0.0 <= value <= 1.0 for value in values)


@anneals
@given(lengths, st.lists(st.integers(0, 3000), max_size=20))
def test_a_schedule_is_a_pure_function(total: int, steps: list[int]) -> None:
    def build() -> list[Schedule]:
        return [
            constant(),
            step_decay(total, 0.9),
            poly(total),
            cosine(total),
            one_cycle(total),
            warm_up(poly(total), 5),
        ]

    for schedule, again in zip(build(), build(), strict=True):
        values = [schedule(step) for step in steps]
        assert [again(step) for step in reversed(steps)] == values[::-1]
        assert all(isinstance(value, float) and math.isfinite(value) for value in values)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda: cosine(0), "total must be a number of steps, at least 1, got 0"),
        (lambda: poly(-1), "total must be a number of steps"),
        (lambda: step_decay(0, 0.5), "every must be a number of steps"),
        (lambda: warm_up(constant(), 0), "steps must be a number of steps"),
        (lambda: one_cycle(0), "total must be a number of steps"),
        (lambda: milestones([5, 2], 0.1), r"milestones must be in ascending order, got \[5, 2\]"),
        (lambda: one_cycle_momentum(10, 1.5), "peak_at must be a part of the run, from 0 to 1, got 1.5"),
    ],
)
def test_mistakes_are_explained(mistake: Callable[[], object], sentence: str) -> None:
    with pytest.raises(MinigradError, match=sentence):
        mistake()
