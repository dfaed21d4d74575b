"""The training step as one CUDA graph: captured once, then repeated by a single call of the host.

A small network is over before the host has started its hundreds of kernels; a graph starts them all. It does again what
was captured, on the same memory with the same arguments, so that whatever changes from step to step lies in memory that
is written before each replay: the batch, the keys of random numbers, the numbers of the optimizer. Losses are
added up where they are read when somebody asks. Evaluation and everything else between two steps is as ever.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from inception.data import Batch
from inception.training.step import Step
from minigrad.backend import array_module, asarray, first_line, precision
from minigrad.errors import BackendError
from minigrad.kernels import kernels
from minigrad.layout import empty_images, pixels
from minigrad.nn import Module
from minigrad.nn.module import observer
from minigrad.random import StoredKey
from minigrad.tensor import watcher

WARM_UP = 3  # steps before the capture, in which kernels are compiled and tables are made


class GraphedStep:
    """`Step.take_step` with the same results, bit for bit.

    The first steps are taken as ever, on a stream of their own; then one is captured, in memory that nothing else
    gets. A step that cannot be captured, or a batch of another size, is taken as ever too. When what the graph takes as
    given has changed, it begins anew: see `_has_changed`.

    warn   is told, once, why the steps are not captured
    """

    def __init__(self, training: Step, warn: Callable[[str], None]):
        self.training, self.warn = training, warn
        self.xp: Any = array_module(next(training.model.parameters()).data)
        self.off = ""  # why no more captures are tried
        self.warm_up = WARM_UP  # steps still to be taken before
        self.drawing: list[tuple[str, Module]] = []  # layers that draw random numbers
        self.totals: dict[str, Any] = {}  # the epoch's sums, to which the graph adds
        self.hits: Any = 0
        self._forget()
        if self.xp is np:
            self._give_up("the backend is numpy, and CUDA graphs are for a GPU (--backend cupy)")
        elif kernels(next(training.model.parameters()).data).__name__.endswith("textbook"):
            self._give_up("the kernels are the textbook's, whose products CuPy does not let a graph record")

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """Within the block the GPU works on a stream of its own, since the usual one cannot be captured."""
        if self.xp is np:
            yield
            return
        outside = self.xp.cuda.get_current_stream()
        self.stream = _stream(self.xp, self.xp.cuda.runtime.getDevice(), threading.get_ident())
        self.stream.wait_event(outside.record())
        with self.stream:
            try:
                yield
            finally:
                outside.wait_event(self.stream.record())

    def take_step(self, batch: Batch) -> None:
        """Forward, backward and update on a batch."""
        training = self.training
        if not self.off and (watcher.get() is not None or observer.get() is not None):
            self._give_up("the model is being watched, and a replay calls no layer that could be seen")
        if self.off or len(batch.labels) != training.batch_size:
            training.take_step(batch)
            return
        if self.graph is not None and self._has_changed():
            self._forget()
            self.warm_up = WARM_UP
        if self.batch is None:
            self._make_room(batch)
        self._write(batch)
        if self.graph is None and self.warm_up:
            training.model.set_key(training.key.fold(training.step), self.batch.rows)
            training.compute(self.batch)
            self.warm_up -= 1
            self.totals, self.hits = training.sums.totals, training.sums.hits
            return
        self._adopt_sums()
        if self.graph is None:
            try:
                self._capture()
            except Exception as error:
                self._give_up(str(error) if isinstance(error, BackendError) else first_line(error))
                training.take_step(batch)
                return
        self._renew()
        self.graph.launch()

    def _give_up(self, reason: str) -> None:
        self.off = reason
        self._forget()
        self.warn(f"the steps are not captured in a CUDA graph but taken one by one: {reason}")

    def _forget(self) -> None:
        """Let go of the graph, and of all memory that it holds."""
        self.graph: Any = None
        self.pool: Any = None  # the memory of what the graph computes: nothing else, and as long as the graph
        self.batch: Any = None  # on the device: what the graph reads
        self.runs: list[Any] = []  # what the graph's update updates
        self.tables: list[Any] = []  # where its gradients lie, on the device
        # What the graph has taken as given:
        self.settings: list[Any] = []  # looked at when an epoch begins
        self.arrays: list[Any] = []  # looked at in every step; this also keeps the memory that the graph writes to

    # ---- Before each step ----

    def _make_room(self, batch: Batch) -> None:
        xp, n = self.xp, len(batch.labels)
        images = empty_images(xp, batch.images.shape, batch.images.dtype)
        self.batch = Batch(images, xp.empty(n, np.int64), xp.empty(n, np.int64))
        self.drawing = [
            (path, module)
            for path, module in self.training.model.named_modules()
            if type(module).take_key is not Module.take_key
        ]
        self.keys = xp.empty(len(self.drawing), np.uint64)

    def _write(self, batch: Batch) -> None:
        """Write the batch, and the keys of this step, to where the graph reads them."""
        pixels(self.batch.images)[...] = asarray(pixels(batch.images))
        for there, here in ((self.batch.labels, batch.labels), (self.batch.rows, batch.rows)):
            there.set(here.astype(np.int64, copy=False))
        if self.drawing:
            key = self.training.key.fold(self.training.step)
            self.keys.set(np.array([key.fold(path).value for path, _ in self.drawing], np.uint64))

    def _hand_out(self) -> None:
        """Let every layer that draws random numbers read its key where `_write` writes it."""
        for i, (_, module) in enumerate(self.drawing):
            module.take_key(StoredKey(self.keys[i]), self.batch.rows)

    def _adopt_sums(self) -> None:
        """Let the epoch's sums be those to which the graph adds, with what they have so far."""
        sums = self.training.sums
        if sums.totals is not self.totals:
            for name, total in self.totals.items():
                total[...] = sums.totals.get(name, 0.0)
            self.hits[...] = sums.hits
            sums.totals, sums.hits = self.totals, self.hits

    def _renew(self) -> None:
        """Say what else is new in this step, and count it."""
        training = self.training
        training.optimizer.runs = self.runs
        training.optimizer.tell(**training.rates())
        for tensor, _, trained in self.arrays:
            if not trained:  # the replay moves running statistics; the optimizer counts its own changes
                tensor.changed("a replayed step")
        training.sums.count(len(self.batch.labels))

    # ---- What a graph takes as given ----

    def _has_changed(self) -> bool:
        """Whether a graph would repeat something that is no longer so: arrays that parameters and buffers no longer
        have, what is trained, or, when an epoch begins, modules and their numbers. Then another is captured."""
        if any(tensor.data is not data or tensor.requires_grad != wanted for tensor, data, wanted in self.arrays):
            return True
        begins = self.training.sums.totals is not self.totals
        return begins and self._settings() != self.settings

    def _settings(self) -> list[Any]:
        modules = [module for _, module in self.training.model.named_modules()]
        plain = (int, float, str, tuple, type(None))
        return [precision(), *((m, {k: v for k, v in vars(m).items() if isinstance(v, plain)}) for m in modules)]

    # ---- Once ----

    def _capture(self) -> None:
        """Have a step recorded, which does nothing to the device, and to the host only what is undone here."""
        training, cuda = self.training, self.xp.cuda
        for path, module in training.model.named_modules():
            if module.recompute:
                raise BackendError(f"{path or 'the model'} is recomputed to save memory, and a graph takes more of it")
        sums, slots = training.sums, training.optimizer.slots
        before = sums.steps, sums.seen, [slot.updates for slot in slots]
        attributes = [(module, module.attributes()) for _, module in training.model.named_modules()]
        self._hand_out()
        gc.collect()  # a training that is over refers to its graph, and that to the training
        self.xp.get_default_memory_pool().free_all_blocks()  # the graph's memory is a step's once more
        self.pool = cuda.MemoryPool(functools.partial(_memory, cuda))
        try:
            self.stream.begin_capture()
            try:
                with cuda.using_allocator(self.pool.malloc):
                    training.compute(self.batch)
            except BaseException:
                with suppress(Exception):  # it says once more that the capture has failed
                    self.stream.end_capture()
                for module, own in attributes:
                    vars(module).update(own)
                raise
            self.graph = self.stream.end_capture()
            self.graph.upload()
            self.settings = self._settings()
            tensors = [t for _, t in (*training.model.named_parameters(), *training.model.named_buffers())]
            self.arrays = [(t, t.data, t.requires_grad) for t in tensors]
        finally:
            training.optimizer.zero_grad()
            sums.steps, sums.seen, updates = before
            for slot, number in zip(slots, updates, strict=True):
                slot.updates = number
        self.runs, self.tables = training.optimizer.finish_capture()


@functools.cache
def _stream(xp: Any, device: int, thread: int) -> Any:
    """The stream on which a thread captures: one for all its trainings, since cuBLAS has memory for every stream."""
    return xp.cuda.Stream(non_blocking=True)


def _memory(cuda: Any, size: int) -> Any:
    """Memory for the graph's pool to grow by. Raises BackendError where there is none: at an error of CUDA's the pool
    would give back what the graph has used before, and try again."""
    try:
        return cuda.MemoryPointer(cuda.Memory(size), 0)
    except Exception as error:
        reason = "a graph has memory of its own, beside that of other steps, and too little is free"
        raise BackendError(f"{reason}: {first_line(error)}") from None
