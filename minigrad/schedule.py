"""Schedules: learning rate and momentum as pure functions of the step.

    schedule, momentum = one_cycle(total), one_cycle_momentum(total)
    optimizer.step(lr=peak * schedule(step), momentum=momentum(step))

A schedule maps the step, counted from 0, to a factor on the peak learning rate. It has no state: there is nothing
to save, a resumed run asks for the step it is at. `total` is the number of steps of the whole run; beyond it a
schedule stays where it ended.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from minigrad.errors import MinigradError

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """1 at every step."""
    return lambda step: 1.0


def step_decay(every: int, factor: float) -> Schedule:
    """factor^⌊step / every⌋: GoogLeNet has 0.96 every 8 epochs (arXiv:1409.4842, 6), Inception v3 0.94 every 2."""
    _at_least_one(every, "every")
    return lambda step: factor ** (step // every)


def milestones(steps: Sequence[int], factor: float) -> Schedule:
    """factor^m once m of the `steps`, in ascending order, have been reached: 0.1 at two of them is 1, 0.1, 0.01."""
    if list(steps) != sorted(steps):
        raise MinigradError(f"milestones must be in ascending order, got {list(steps)}")
    return lambda step: factor ** bisect_right(steps, step)


def poly(total: int, power: float = 1.0) -> Schedule:
    """(1 − step / total)^power: from 1 down to 0. Power 0.5 is Caffe's recipe for a quick GoogLeNet."""
    _at_least_one(total, "total")
    return lambda step: (1.0 - min(step / total, 1.0)) ** power


def cosine(total: int, floor: float = 0.0) -> Schedule:
    """Half a cosine from 1 down to `floor`, reached at step = total (SGDR without restarts, arXiv:1608.03983)."""
    _at_least_one(total, "total")
    return lambda step: _half_cosine(1.0, floor, min(step / total, 1.0))


def one_cycle(total: int, peak_at: float = 0.3, start: float = 1 / 25, end: float = 1 / 25e4) -> Schedule:
    """Half a cosine from `start` up to 1, then another down to `end`, reached at the last step, total − 1.

    peak_at   the part of the run before the peak, which is at step peak_at·total − 1, often between two steps

    Step for step torch.optim.lr_scheduler.OneCycleLR and its defaults. Smith, Topin: Super-convergence,
    arXiv:1708.07120.
    """
    return _there_and_back(total, peak_at, start, 1.0, end)


def one_cycle_momentum(total: int, peak_at: float = 0.3, high: float = 0.95, low: float = 0.85) -> Schedule:
    """The momentum that goes with `one_cycle`: `high` at both ends, `low` at the peak of the learning rate.

    A value, not a factor.
    """
    return _there_and_back(total, peak_at, high, low, high)


def warm_up(schedule: Schedule, steps: int) -> Schedule:
    """`schedule`, times (step + 1) / steps during the first `steps` steps (Goyal et al., arXiv:1706.02677, 2.2).

    The steps of the warm-up count: the schedule's total stays the run's.
    """
    _at_least_one(steps, "steps")
    return lambda step: min((step + 1) / steps, 1.0) * schedule(step)


def _half_cosine(begin: float, end: float, part: float) -> float:
    """From `begin` at part 0 to `end` at part 1, flat at both."""
    return end + (begin - end) / 2.0 * (math.cos(math.pi * part) + 1.0)


def _there_and_back(total: int, peak_at: float, start: float, peak: float, end: float) -> Schedule:
    _at_least_one(total, "total")
    if not 0.0 <= peak_at <= 1.0:
        raise MinigradError(f"peak_at must be a part of the run, from 0 to 1, got {peak_at}")
    top, last = peak_at * total - 1.0, total - 1.0

    def value(step: int) -> float:
        if step <= top:
            return _half_cosine(start, peak, step / top if top else 1.0)
        return _half_cosine(peak, end, (min(step, last) - top) / (last - top) if top < last else 1.0)

    return value


def _at_least_one(count: int, name: str) -> None:
    if count < 1:
        raise MinigradError(f"{name} must be a number of steps, at least 1, got {count}")
