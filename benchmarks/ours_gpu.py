"""minigrad's networks on a GPU, op by op and as a CUDA graph."""

from __future__ import annotations

from typing import Any

import numpy as np

import minigrad
from benchmarks.ours import Ours
from benchmarks.vocabulary import Contender, Workload
from inception.data import Batch, Dataset, Loader
from inception.training import Recipe, Training
from minigrad.backend import default_module, to_host


def build(contender: Contender, work: Workload, device: int) -> OnGpu:
    return (Graphed if contender.graph else OnGpu)(work, device, contender.precision)


class OnGpu(Ours):
    def __init__(self, work: Workload, device: int, precision: str):
        minigrad.set_backend("cupy", device)
        minigrad.set_precision(precision)
        super().__init__(work)
        cupy: Any = default_module()
        pool = cupy.get_default_memory_pool()
        self.wait, self.trim = cupy.cuda.Device(device).synchronize, pool.free_all_blocks
        self.device_mb = lambda: pool.total_bytes() / 2**20


class Graphed(OnGpu):
    """The CUDA graph that `inception.training` makes of its step; forward and evaluation run op by op."""

    def __init__(self, work: Workload, device: int, precision: str):
        super().__init__(work, device, precision)
        pictures = np.zeros((work.batch, work.size, work.size, 3), np.uint8)
        names = tuple(map(str, range(work.classes)))
        dataset = Dataset(pictures, to_host(self.labels), names, "noise")
        loader = Loader(dataset, work.batch, mean=np.zeros(3), std=np.ones(3))
        recipe = Recipe(lr=0.01, nesterov=False, weight_decay=0.0, schedule="constant")
        options: Any = {"graph": True, "quiet": True}
        self.training: Any = Training(self.model.train(), loader, recipe, **options)
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
