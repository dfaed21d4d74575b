"""The average of a model's weights along its training, often better than where the training stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np

from minigrad.backend import array_module
from minigrad.errors import BackendError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.nn import Module


class Average:
    """An exponential moving average of every parameter and buffer of a model.

        s ← d·s + w,   c ← d·c + 1,      the average is s / c:

    every w has the weight dᵃ, a being its age in updates, and the division makes it a mean from the first update on;
    a run much shorter than 1 / (1 − d) updates gives Polyak's plain mean. An update allocates nothing.

    decay   d per step; every: steps between updates, each of which then decays by d^every
    Source  Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992; with decay, as in
            arXiv:1512.00567, section 8. Buffers are averaged like weights.
    """

    def __init__(self, model: Module, decay: float, every: int = 1):
        self.decay, self.every = decay**every, every
        self.tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        self.sums: dict[str, Array] = {
            name: array_module(tensor.data).zeros_like(tensor.data) for name, tensor in self.tensors.items()
        }
        self.count = 0.0
        self.together: Any = None  # on a GPU: the launch for all of them, made when it is first needed

    def update(self, step: int) -> None:
        """Take in the weights after the step of this number, from 0."""
        if (step + 1) % self.every:
            return
        rows = {}
        for i, (name, tensor) in enumerate(self.tensors.items()):
            total = self.sums[name]
            if self._in_one_launch(i, total, tensor.data):
                rows[i] = (total, tensor.data), (self.decay,)
            else:
                total *= self.decay
                total += tensor.data
        if rows:
            self.together.write(rows)
            self.together.launch()
        self.count = self.decay * self.count + 1.0

    def _in_one_launch(self, i: int, total: Array, weights: Array) -> bool:
        if array_module(total) is not array_module(weights):
            raise BackendError("the weights have moved to another backend since their average began: begin a new one")
        if isinstance(total, np.ndarray):
            return False
        if self.together is None:
            self.together = kernels(total).Together("average", list(self.sums.values()))
        return self.together.takes(i, total, weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights. Before the first update: those it has."""
        held = {name: tensor.data for name, tensor in self.tensors.items()}
        try:
            if self.count:
                for name, tensor in self.tensors.items():
                    total = self.sums[name]
                    xp = array_module(total)
                    tensor.data = xp.multiply(total, 1.0 / self.count, out=xp.empty_like(total))
            yield
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = held[name]
