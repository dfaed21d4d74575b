"""The words of the benchmarks: workloads, contenders, networks, jobs. This file imports no framework."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Record = dict[str, Any]  # one row of figures, as results.json holds it

MEASURES = ("evaluate", "forward", "step")  # ordered by the memory that they need
TITLES = {"evaluate": "evaluation", "forward": "forward", "step": "training step"}
HEAD_WEIGHT = 0.3  # of an auxiliary head's loss


class Workload(NamedTuple):
    """A network on a batch of pictures of size×size."""

    model: str
    size: int
    classes: int
    batch: int
    heads: bool = False


WORKLOADS = {
    "small": Workload("googlenet_small", 32, 10, 128),
    "googlenet": Workload("googlenet", 224, 1000, 16),
    "googlenet_heads": Workload("googlenet", 224, 1000, 8, heads=True),
}
FULL = {"small": [1, 16, 128], "googlenet": [1, 16], "googlenet_heads": [8]}  # the batches of `compare --full`


class Contender(NamedTuple):
    """One network of a comparison: who computes it, and how."""

    title: str
    kind: str  # "ours", "torch", "onnxruntime" or "openvino"
    measures: tuple[str, ...] = MEASURES
    channels_last: bool = False
    compiled: bool = False  # an engine that compiles the network first
    kernels: str = ""  # minigrad's kernels, by the name that minigrad.set_kernels takes
    precision: str = "float32"
    graph: bool = False  # on a GPU: each call is recorded once and replayed as a CUDA graph

    @property
    def ours(self) -> bool:
        return self.kind == "ours"

    @property
    def eager(self) -> bool:
        return self.kind == "torch" and not self.compiled and not self.graph


HOST = {
    "ours": Contender("minigrad", "ours"),
    "ours_before": Contender("minigrad, --against", "ours"),
    "ours_textbook": Contender("minigrad, textbook", "ours", kernels="textbook"),
    "ours_loops": Contender("minigrad, loops", "ours", kernels="loops"),
    "torch": Contender("PyTorch, NCHW", "torch"),
    "torch_channels_last": Contender("PyTorch, channels_last", "torch", channels_last=True),
    "torch_compile": Contender("PyTorch, compiled", "torch", ("evaluate", "step"), channels_last=True, compiled=True),
    "onnxruntime": Contender("onnxruntime", "onnxruntime", ("evaluate",), compiled=True),
    "openvino": Contender("OpenVINO", "openvino", ("evaluate",), compiled=True),
}
PEERS = [who for who, contender in HOST.items() if not contender.ours]
GPU = {
    f"{who}_{precision}{graph}": HOST[who]._replace(
        title=f"{HOST[who].title}, {precision}{graph.replace('_', ', ')}", precision=precision, graph=bool(graph)
    )
    for who in ("ours", "torch_channels_last", "torch")  # measured in this order while time is left
    for graph in ("", "_graph")
    for precision in ("tf32", "float32", "bf16")  # bf16 is PyTorch's autocast
    if (who, precision) != ("ours", "bf16")
}
CONTENDERS = HOST | GPU


class Network:
    """A network that can be measured. `loss` builds the graph. `update` is SGD with momentum, then clears gradients."""

    set_threads: Callable[[int], None]
    loss: Callable[[], Any]
    update: Callable[[], None]
    forward: Callable[[], Any]  # in training mode, nothing recorded
    evaluate: Callable[[], Any]  # in evaluation mode, nothing recorded
    kept_bytes: Callable[[], int]  # bytes held between forward and backward, without the parameters
    first_step: Callable[[str], None]  # take the first training step; write its results as the .npz file of this name
    # On a GPU
    wait: Callable[[], None]  # until the GPU has done all that it was told
    device_mb: Callable[[], float]  # the most GPU memory that the framework has held since `trim`, MiB
    trim: Callable[[], None]  # give unused GPU memory back

    def step(self) -> None:
        self.loss().backward()
        self.update()

    def parts_of_step(self) -> dict[str, float]:
        """Take a training step; return the seconds of its parts."""
        start = time.perf_counter()
        loss = self.loss()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.update()
        return {"forward": forward - start, "backward": backward - forward, "update": time.perf_counter() - backward}


class Job(NamedTuple):
    """The work of one child process: for every workload every measure, with every number of threads."""

    who: str  # a name of CONTENDERS
    works: list[Workload]
    threads: list[int]
    measures: list[str]
    repeats: int
    keep_memory: bool = True  # False: a peer runs with the C library's own allocator setting
    device: int | None = None  # the number of the GPU; None: the CPU
    python: str = sys.executable  # minigrad's interpreter; peers run in the parent's
    checkout: str = ""  # the folder that holds minigrad and inception; "": this checkout
    model_file: str = ""  # the ONNX file that onnxruntime and OpenVINO read

    @property
    def contender(self) -> Contender:
        return CONTENDERS[self.who]


class Failed(Exception):
    """A measurement cannot be made; the text is one sentence."""
