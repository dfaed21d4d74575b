"""The networks written again for PyTorch, without minigrad: see `processes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.vocabulary import HEAD_WEIGHT, Contender, Network, Workload

# Output channels: 1×1, 3×3 reduction, 3×3, 5×5 reduction, 5×5, projection after the pool. None: a pool between modules.
Row = tuple[int, int, int, int, int, int]
TABLE: list[Row | None] = [
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    None,
    (192, 96, 208, 16, 48, 64),  # 4a, a head after it
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),  # 4d, a head after it
    (256, 160, 320, 32, 128, 128),
    None,
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
]
SMALL_TABLE: list[Row | None] = [
    (16, 32, 32, 16, 8, 8),
    (24, 32, 48, 16, 12, 12),
    None,
    (24, 32, 48, 16, 12, 12),
    (16, 32, 48, 16, 16, 16),
    (16, 32, 48, 16, 16, 16),
    (32, 32, 48, 16, 24, 24),
    None,
    (32, 48, 64, 16, 16, 16),
    (32, 48, 64, 16, 16, 16),
]


def build(form: Contender, work: Workload, device: int | None = None) -> Network:
    """The workload's network in PyTorch, as `form` says; on the CPU, or on the GPU of this number."""
    where = torch.device("cpu") if device is None else gpu(device, form.precision)
    article, small = work.model == "googlenet", work.model == "googlenet_small"
    norm_first = article or small  # biases in front of batch norm, padded pools

    class Unit(nn.Sequential):
        def __init__(self, i: int, o: int, k: int, **options: int):
            conv = nn.Conv2d(i, o, k, bias=norm_first, **options)
            super().__init__(conv, nn.BatchNorm2d(o, eps=1e-5 if norm_first else 1e-3), nn.ReLU())

    class Module(nn.Module):
        def __init__(self, i: int, row: Row):
            super().__init__()
            c1, r3, c3, r5, c5, project = row
            self.branches = nn.ModuleList(
                [
                    Unit(i, c1, 1),
                    nn.Sequential(Unit(i, r3, 1), Unit(r3, c3, 3, padding=1)),
                    nn.Sequential(Unit(i, r5, 1), Unit(r5, c5, 5, padding=2)),
                    nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(i, project, 1)),
                ]
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([branch(x) for branch in self.branches], 1)

    class Head(nn.Sequential):
        def __init__(self, i: int):
            fc = [nn.Flatten(), nn.Linear(2048, 1024), nn.ReLU(), nn.Dropout(0.7), nn.Linear(1024, work.classes)]
            super().__init__(nn.AvgPool2d(5, 3), Unit(i, 128, 1), *fc)

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, 1) if norm_first else nn.MaxPool2d(3, 2, ceil_mode=True)

    class GoogLeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if small:
                layers, channels = [Unit(3, 64, 3, padding=1)], 64
            else:
                between = [] if article else [Unit(64, 64, 1)]
                first, last = Unit(3, 64, 7, stride=2, padding=3), Unit(64, 192, 3, padding=1)
                layers, channels = [first, pool(), *between, last, pool()], 192
            heads = {}
            for i, row in enumerate(SMALL_TABLE if small else TABLE):
                if row is None:
                    layers.append(pool())
                    continue
                layers.append(Module(channels, row))
                channels = row[0] + row[2] + row[4] + row[5]
                if work.heads and i in (3, 6):
                    heads[str(len(layers) - 1)] = Head(channels)
            dropout = nn.Dropout(0.0 if small else 0.4)
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), dropout, nn.Linear(channels, work.classes)]
            self.layers, self.heads = nn.ModuleList(layers), nn.ModuleDict(heads)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            outputs = []
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if self.training and str(i) in self.heads:
                    outputs.append(self.heads[str(i)](x))
            return [*outputs, x]

    memory = torch.channels_last if form.channels_last else torch.contiguous_format
    model = GoogLeNet().to(where, memory_format=memory)
    x = torch.randn(work.batch, 3, work.size, work.size).to(where, memory_format=memory)
    labels = torch.randint(0, work.classes, (work.batch,)).to(where)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    compiled = torch.compile(model) if form.compiled else model

    def autocast() -> torch.autocast:
        return torch.autocast(
            where.type, torch.bfloat16, enabled=form.precision == "bf16", cache_enabled=not form.graph
        )

    class Torch(Network):
        def __init__(self) -> None:
            self.model, self.set_threads = model, torch.set_num_threads

        def loss(self) -> torch.Tensor:
            model.train()
            with autocast():
                *heads, main = compiled(x)
                loss = nn.functional.cross_entropy(main, labels)
                for logits in heads:
                    loss = loss + nn.functional.cross_entropy(logits, labels) * HEAD_WEIGHT
                return loss

        def update(self) -> None:
            optimizer.step()
            optimizer.zero_grad()

        def forward(self) -> None:
            model.train()
            with torch.no_grad(), autocast():
                compiled(x)

        def evaluate(self) -> None:
            model.eval()
            with torch.no_grad(), autocast():
                compiled(x)

        def kept_bytes(self) -> int:
            kept: dict[int, int] = {}  # address -> bytes; the graph holds them all, so no address occurs twice

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = self.loss()
            for parameter in model.parameters():
                kept.pop(parameter.untyped_storage().data_ptr(), None)
            del loss
            return sum(kept.values())

    network = Torch()
    if device is not None:
        network.wait, network.trim = torch.cuda.synchronize, trim
        network.device_mb = lambda: torch.cuda.max_memory_reserved() / 2**20
    return Recorded(network) if form.graph else network


# ---- On a GPU ----


def gpu(device: int, precision: str) -> torch.device:
    """The GPU, set to this precision of products and convolutions, and to the fastest of cuDNN's algorithms."""
    if not torch.cuda.is_available():
        raise SystemExit(f"this PyTorch, {torch.__version__}, has no GPU: install one that is built for CUDA")
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.device("cuda", device)


def trim() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class Recorded(Network):
    """A network whose first call of each kind is recorded as a CUDA graph; later calls replay the graph."""

    def __init__(self, network: Network):
        self.wait, self.trim, self.device_mb = network.wait, network.trim, network.device_mb
        self.step = self.recorded(network.step)  # type: ignore[method-assign]
        self.forward, self.evaluate = self.recorded(network.forward), self.recorded(network.evaluate)

    def recorded(self, call: Callable[[], Any]) -> Callable[[], Any]:
        graph: Any = None

        def run() -> None:
            nonlocal graph
            if graph is None:
                graph = record(call)
            graph.replay()

        return run


def record(call: Callable[[], Any]) -> Any:
    """A call as a torch.cuda.CUDAGraph, after three calls on another stream, as PyTorch's manual asks for."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
