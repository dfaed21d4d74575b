"""Alarms: sentences about a training run that goes wrong, from numbers that are at hand anyway.

Each kind is a pure function that returns {subject: sentence}, empty when all is well; `Watchdog` remembers what they
need of the past, and says each thing once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from minigrad import Tensor, no_grad
from minigrad.nn import Module
from minigrad.watch import Event, each_op, untouched

Alarms = dict[str, str]


def no_better_than_guessing(losses: Mapping[str, float], classes: int, steps: int) -> Alarms:
    """Heads whose mean loss is still above 0.98·ln K, or 0.98 times what guessing gives, after many steps.

    losses   of the classifier and each head, nats, mean over the latest steps
    steps    taken so far; nothing is said before max(200, 5·K) of them
    """
    guessing = math.log(classes)
    if steps < max(200, 5 * classes):
        return {}
    return {
        f"{name} at chance": f"{name} is {loss:.4f} after {steps:,} steps, no better than guessing (ln {classes} = "
        f"{guessing:.4f}): check that labels belong to their pictures and that this head's layers are trained, then "
        "the learning rate"
        for name, loss in losses.items()
        if loss >= 0.98 * guessing > 0
    }


def exploding(
    losses: Mapping[str, float], first: Mapping[str, float], lowest: Mapping[str, float], classes: int
) -> Alarms:
    """Losses that are not finite; that grow beyond twice their start, or ten times their lowest and back to half their
    start; that are far above guessing when first looked at.

    first, lowest   of the losses so far, by the same names. A start counts as ln K at least, for a resumed run starts
                    low, and as 2·ln K at most, for the first mean may come after the explosion.
    """
    found = {}
    for name, loss in losses.items():
        start = min(max(first.get(name, 0.0), math.log(classes)), 2 * math.log(classes))
        low = lowest.get(name, math.inf)
        if not math.isfinite(loss):
            found[f"{name} not finite"] = (
                f"{name} is {loss}: minigrad.first_non_finite(model, step) names the layer where it begins"
            )
        elif name not in first and loss > 2 * start:
            found[f"{name} far above guessing"] = (
                f"{name} is {loss:.4g}, far above what guessing gives (ln {classes} = {math.log(classes):.4g}): if "
                "it does not fall soon, lower the learning rate, or warm up longer"
            )
        elif loss >= low and (loss > max(2 * start, first.get(name, 0.0)) or (loss > 10 * low and loss > start / 2)):
            found[f"{name} explodes"] = (
                f"{name} has grown to {loss:.4g} (it started at {first[name]:.4g}, its lowest was "
                f"{low:.4g}): lower the learning rate, warm up longer, or clip gradients"
            )
    return found


def slow_loader(waited: float, seconds: float) -> Alarms:
    """A loader for which the loop has waited more than 20 % of `seconds` (nothing is said in the first five)."""
    if seconds < 5 or waited <= 0.2 * seconds:
        return {}
    return {
        "slow loader": f"the loop waited {waited:.1f} s of {seconds:.1f} s ({waited / seconds:.0%}) for pictures: "
        "prefetch, read from a faster disk, or augment less"
    }


def dead_layers(model: Module, pictures: Tensor) -> Alarms:
    """Layers with a ReLU whose output is zero for all `pictures`: no gradient gets through them.

    Costs a forward pass in training mode, so that heads run too; statistics and modes are put back.
    """
    alive: dict[str, bool] = {}

    def see(event: Event) -> None:
        if "relu" in event.op or getattr(event.module, "relu", None) is True:  # batch norm does both in one pass
            alive[event.place] = alive.get(event.place, False) or bool(event.outputs[0][1].any())

    with untouched(model), no_grad(), each_op(model, see):
        model.train()
        model(pictures)
    return {
        f"{place} dead": f"{place} gives zero for all {len(pictures)} pictures of a batch, so it learns nothing "
        "more: lower the learning rate, and go back to weights from before"
        for place, lives in alive.items()
        if not lives
    }


class Watchdog:
    """Says once what is wrong: feed it once an epoch, or whenever the means of the losses are fetched.

    classes   how many the classifier tells apart
    """

    def __init__(self, classes: int):
        self.classes = classes
        self.first: dict[str, float] = {}
        self.lowest: dict[str, float] = {}
        self.said: set[str] = set()

    def look(self, steps: int, losses: Mapping[str, float], *, waited: float = 0.0, seconds: float = 0.0) -> list[str]:
        """What is new and wrong after `steps` steps.

        losses            by name ("loss", "aux1", …), nats, mean over the latest steps
        waited, seconds   for the loader, of the time that training took
        """
        found = exploding(losses, self.first, self.lowest, self.classes)
        worse = {subject.split()[0] for subject in found}  # one sentence about a head is enough
        others = {name: loss for name, loss in losses.items() if name not in worse}
        found |= no_better_than_guessing(others, self.classes, steps)
        for name, loss in losses.items():
            if math.isfinite(loss):
                self.first.setdefault(name, loss)
                self.lowest[name] = min(loss, self.lowest.get(name, loss))
        return self._new(found | slow_loader(waited, seconds))

    def look_at_layers(self, model: Module, pictures: Tensor) -> list[str]:
        """Which layers are newly found dead on a batch (N, C, H, W): see `dead_layers`."""
        return self._new(dead_layers(model, pictures))

    def _new(self, found: Alarms) -> list[str]:
        fresh = [sentence for subject, sentence in found.items() if subject not in self.said]
        self.said |= found.keys()
        return fresh
