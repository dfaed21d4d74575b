"""The average of a model's weights along its training, often better than where the training stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from minigrad.backend import array_module, capturing
from minigrad.errors import BackendError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.nn import Module
from minigrad.tensor import Tensor


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
        captured = capturing(array_module(next(iter(self.sums.values()))))  # in any step, due or not: see `renew`
        if not self._due(step) and not captured:
            return
        apart = self.place()
        if apart and captured:
            raise BackendError(f"the average has no kernel for {next(iter(apart))}, whose values lie apart in memory")
        for name, tensor in apart.items():
            total = self.sums[name]
            total *= self.decay
            total += tensor.data
        if self.together is not None:
            self.together.launch()
        self.count = self.decay * self.count + 1.0

    def renew(self, step: int) -> None:
        """What is left for the host to do where a CUDA graph that has captured `update` is replayed: count, or, in a
        step without an update, leave all sums alone (`together.upload` tells the device)."""
        if self._due(step):
            self.count = self.decay * self.count + 1.0
        else:
            self.together.place({})

    def _due(self, step: int) -> bool:
        return (step + 1) % self.every == 0

    def place(self) -> dict[str, Tensor]:
        """On a GPU: tell the launch where sums and weights are. What does not fit in is returned."""
        rows, apart = {}, {}
        for i, (name, tensor) in enumerate(self.tensors.items()):
            if self._in_one_launch(i, self.sums[name], tensor.data):
                rows[i] = self.sums[name], tensor.data
            else:
                apart[name] = tensor
        if rows:
            self.together.place(rows)
            self.together.tell(dict.fromkeys(rows, (self.decay,)))
        return apart

    def _in_one_launch(self, i: int, total: Array, weights: Array) -> bool:
        if array_module(total) is not array_module(weights):
            raise BackendError("the weights have moved to another backend since their average began: begin a new one")
        if not hasattr(kernels(total), "Together"):
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
