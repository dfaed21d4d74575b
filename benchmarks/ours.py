"""Our networks, as they are measured."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np

import minigrad
from benchmarks.measure import HEAD_WEIGHT, Form, Network, Workload
from inception.data import Batch, Dataset, Loader
from inception.models import create_model
from inception.training import Recipe, Training
from minigrad import Tensor, layout, no_grad, ops, optim
from minigrad.backend import asarray, default_module, to_host
from minigrad.random import Key, integers, normal
from minigrad.threads import blas_on_one_thread


def build(who: str, work: Workload, device: int | None = None) -> Network:
    if device is None:
        return Ours(work)
    form = Form.of(who)
    return (Graphed if form.graph else OnGpu)(work, device, form.precision)


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
        with blas_on_one_thread():
            super().step()

    def parts_of_step(self) -> dict[str, float]:
        with blas_on_one_thread():
            return super().parts_of_step()

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
        """As NumPy reports its memory to tracemalloc: the input too, which the first convolution keeps."""
        self.set_threads(1)  # one thread's working memory, which has grown before
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


class OnGpu(Ours):
    """The same on a GPU."""

    def __init__(self, work: Workload, device: int, precision: str):
        minigrad.set_backend("cupy", device)
        minigrad.set_precision(precision)
        super().__init__(work)
        cupy: Any = default_module()
        pool = cupy.get_default_memory_pool()
        self.wait, self.trim = cupy.cuda.Device(device).synchronize, pool.free_all_blocks
        self.device_mb = lambda: pool.total_bytes() / 2**20


class Graphed(OnGpu):
    """The step of `inception.training`, as the CUDA graph that it makes of it; forward and evaluation are as ever."""

    def __init__(self, work: Workload, device: int, precision: str):
        super().__init__(work, device, precision)
        pictures = np.zeros((work.batch, work.size, work.size, 3), np.uint8)
        names = tuple(map(str, range(work.classes)))
        dataset = Dataset(pictures, to_host(self.labels), names, "noise")
        loader = Loader(dataset, work.batch, mean=np.zeros(3), std=np.ones(3))
        options: Any = {"graph": True, "quiet": True}
        self.training: Any = Training(
            self.model.train(),
            loader,
            Recipe(lr=0.01, nesterov=False, weight_decay=0.0, schedule="constant"),
            **options,
        )
        self.batch = Batch(self.x.data, dataset.labels, np.arange(work.batch))
        of_default_pool = self.device_mb
        self.device_mb = lambda: of_default_pool() + self.pool_mb()

    def step(self) -> None:
        graphed = self.training.graphed
        self.model.train()
        with graphed.on_its_stream():
            graphed.take_step(self.batch)
        self.training.step += 1
        if graphed.off:
            raise SystemExit(f"the step is not captured: {graphed.off}")

    def pool_mb(self) -> float:
        pool = self.training.graphed.pool
        return pool.total_bytes() / 2**20 if pool else 0.0
