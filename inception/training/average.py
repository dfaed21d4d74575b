"""The average of a model's weights along its training, often better than where the training stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from minigrad.arena import Arena, Block, arenas, spread
from minigrad.layout import Array
from minigrad.nn import Module


class Average:
    """An exponential moving average of every parameter and buffer of a model.

        s ← d·s + w,   c ← d·c + 1,      the average is s / c:

    every w has the weight dᵃ, a being its age in updates, and the division makes it a mean from the first update on;
    a run much shorter than 1 / (1 − d) updates gives Polyak's plain mean.

    decay    d per step; every: steps between updates, each of which then decays by d^every
    shared   the arenas of the model's optimizer; tensors that lie in none are moved into one
    Source   Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992; with decay, as in
             arXiv:1512.00567, section 8. Buffers are averaged like weights.
    """

    def __init__(self, model: Module, decay: float, every: int = 1, shared: Iterable[Arena] = ()):
        self.decay, self.every = decay**every, every
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        self.arenas = list(shared)
        held = {id(tensor) for arena in self.arenas for tensor in arena.tensors}
        self.arenas += arenas({id(tensor): tensor for tensor in tensors.values() if id(tensor) not in held}.values())
        self.values = [arena.zeros() for arena in self.arenas]
        views = {
            id(tensor): view
            for arena, values in zip(self.arenas, self.values, strict=True)
            for tensor, view in zip(arena.tensors, values.views, strict=True)
        }
        self.sums = {name: views[id(tensor)] for name, tensor in tensors.items()}  # s
        self.count = 0.0  # c

    def update(self, step: int) -> None:
        """Take in the weights after the step of this number, from 0."""
        if (step + 1) % self.every:
            return
        for arena, (sums, _) in zip(self.arenas, self.values, strict=True):
            arena.refresh("Average")

            def add(block: Block, weights: Array = arena.data, sums: Array = sums) -> None:
                part = sums[block.values]
                part *= self.decay
                part += weights[block.values]

            spread(arena.xp, add, arena.blocks())
        self.count = self.decay * self.count + 1.0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights. Before the first update: those it has."""
        held = [(tensor, tensor.data) for arena in self.arenas for tensor in arena.tensors]
        try:
            if self.count:
                for arena, (sums, _) in zip(self.arenas, self.values, strict=True):
                    means = arena.cut(sums * (1.0 / self.count)).views
                    for tensor, mean in zip(arena.tensors, means, strict=True):
                        tensor.data = mean
            yield
        finally:
            for tensor, data in held:
                tensor.data = data
