"""minigrad's networks on the CPU, as they are measured."""

from __future__ import annotations

import gc
import tracemalloc
from contextlib import nullcontext
from typing import Any

import numpy as np

import minigrad
from benchmarks.vocabulary import HEAD_WEIGHT, Network, Workload
from inception.models import create_model
from minigrad import Tensor, layout, no_grad, ops, optim, threads
from minigrad.backend import asarray, to_host
from minigrad.random import Key, integers, normal

# Earlier versions multiply by BLAS, which they hold to one thread: best around a whole step.
_alone = getattr(threads, "blas_on_one_thread", nullcontext)


def use_kernels(name: str) -> None:
    """Let minigrad compute with the kernels of this name; "" leaves its own choice."""
    if not name:
        return
    if not hasattr(minigrad, "set_kernels"):
        raise SystemExit(f"this version of minigrad has no set_kernels, so the {name} kernels cannot be chosen")
    minigrad.set_kernels(name)


class Ours(Network):
    def __init__(self, work: Workload):
        n, size = work.batch, work.size
        self.model = create_model(work.model, num_classes=work.classes, aux_logits=work.heads)
        pixels = asarray(normal(Key(0), (n * size * size, 3)).astype(np.float32))
        self.x, self.labels = Tensor(layout.images(pixels, n, size, size)), asarray(integers(Key(1), work.classes, n))
        self.optimizer = optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.set_threads = minigrad.set_num_threads

    def loss(self) -> Tensor:
        outputs = self.model.train()(self.x)
        *heads, main = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = ops.cross_entropy(main, self.labels)
        for logits in heads:
            loss = loss + ops.cross_entropy(logits, self.labels) * HEAD_WEIGHT
        return loss

    def step(self) -> None:
        with _alone():
            super().step()

    def parts_of_step(self) -> dict[str, float]:
        with _alone():
            return super().parts_of_step()

    def first_step(self, file: str) -> None:
        with _alone():
            loss = self.loss()
            loss.backward()
            arrays: dict[str, Any] = {"loss": to_host(loss.data)}
            parameters = list(self.model.parameters())
            arrays |= {f"gradient {i}": to_host(p.grad).copy() for i, p in enumerate(parameters) if p.grad is not None}
            self.update()
            arrays |= {f"parameter {i}": to_host(p.data) for i, p in enumerate(parameters)}
        np.savez(file, **arrays)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> None:
        with no_grad():
            self.model.train()(self.x)

    def evaluate(self) -> None:
        with no_grad():
            self.model.eval()(self.x)

    def kept_bytes(self) -> int:
        """As NumPy reports its memory to tracemalloc; the input counts, because the first convolution keeps it."""
        self.set_threads(1)  # working memory of one thread, which has grown to its size in the step before
        self.step()
        gc.collect()
        tracemalloc.start()
        try:
            self.x = Tensor(self.x.data.copy("K"))
            loss = self.loss()
            gc.collect()
            arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
            snapshot = tracemalloc.take_snapshot().filter_traces([arrays])
            del loss
            return sum(trace.size for trace in snapshot.traces)
        finally:
            tracemalloc.stop()
