#!/usr/bin/env python3
"""Time one training step (forward, backward, SGD with momentum), beside PyTorch if it is installed.

    python benchmarks/step.py                                   # both workloads
    python benchmarks/step.py --workload googlenet --heads --batch 8

Ours and PyTorch's steps are taken in turn in the same process order, each in a process of its own, with the same
number of threads; the ratio is the median of the ratios of neighbouring runs. A ratio below 1 means that we are faster.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

WORKLOADS = {"small": ("googlenet_small", 32, 10, 128), "googlenet": ("googlenet", 224, 1000, 16)}


def our_step(name: str, size: int, classes: int, batch: int, heads: bool, threads: int):
    import numpy as np

    import minigrad
    from inception.models import create_model
    from minigrad import Tensor, layout, ops, optim
    from minigrad.random import Key, integers, normal
    from minigrad.threads import blas_on_one_thread

    minigrad.set_num_threads(threads)
    model = create_model(name, num_classes=classes, aux_logits=heads)
    pixels = normal(Key(0), (batch * size * size, 3)).astype(np.float32)
    x, labels = Tensor(layout.images(pixels, batch, size, size)), integers(Key(1), classes, batch)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        with blas_on_one_thread():
            outputs = model(x)
            *aux, main = outputs if heads else (outputs,)
            loss = ops.cross_entropy(main, labels)
            for logits in aux:
                loss = loss + ops.cross_entropy(logits, labels) * 0.3
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def torch_step(name: str, size: int, classes: int, batch: int, heads: bool, threads: int):
    import torch
    from torch import nn

    from inception.models import googlenet, small

    class Unit(nn.Module):
        def __init__(self, i: int, o: int, k: int, **options: int):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(i, o, k, **options), nn.BatchNorm2d(o)

        def forward(self, x):
            return torch.relu(self.norm(self.conv(x)))

    class Module(nn.Module):
        def __init__(self, i: int, row: googlenet.Row):
            super().__init__()
            self.branches = nn.ModuleList(
                [
                    Unit(i, row.c1, 1),
                    nn.Sequential(Unit(i, row.r3, 1), Unit(row.r3, row.c3, 3, padding=1)),
                    nn.Sequential(Unit(i, row.r5, 1), Unit(row.r5, row.c5, 5, padding=2)),
                    nn.Sequential(nn.MaxPool2d(3, 1, 1), Unit(i, row.pool, 1)),
                ]
            )

        def forward(self, x):
            return torch.cat([branch(x) for branch in self.branches], 1)

    class Head(nn.Sequential):
        def __init__(self, i: int):
            fc = [nn.Flatten(), nn.Linear(2048, 1024), nn.ReLU(), nn.Dropout(0.7), nn.Linear(1024, classes)]
            super().__init__(nn.AvgPool2d(5, 3), Unit(i, 128, 1), *fc)

    torch.set_num_threads(threads)
    if name == "googlenet":
        pool = nn.MaxPool2d(3, 2, 1)
        layers, channels = [Unit(3, 64, 7, stride=2, padding=3), pool, Unit(64, 192, 3, padding=1), pool], 192
        table = googlenet.TABLE_1
    else:
        layers, channels, table = [Unit(3, 64, 3, padding=1)], 64, small.SMALL_TABLE
    aux = nn.ModuleDict()
    for row in table:
        if isinstance(row, str):
            layers.append(nn.MaxPool2d(3, 2, 1))
            continue
        layers.append(Module(channels, row))
        channels = row.out
        if heads and f"inception{row.name}" in googlenet.HEADS_AFTER:
            aux[str(len(layers) - 1)] = Head(channels)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    model = nn.ModuleDict({"trunk": nn.ModuleList(layers), "aux": aux}).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        y, loss = x, 0.0
        for i, layer in enumerate(layers):
            y = layer(y)
            if str(i) in aux:
                loss = loss + 0.3 * nn.functional.cross_entropy(aux[str(i)](y), labels)
        (nn.functional.cross_entropy(y, labels) + loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(who: str, arguments: list) -> dict:
    """The median time of a step in seconds and the process's peak memory in MB."""
    step = {"ours": our_step, "torch": torch_step}[who](*arguments)
    for _ in range(2):
        step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS], action="append")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--heads", action="store_true", help="with auxiliary heads (googlenet)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, *arguments = json.loads(args.child)
        print(json.dumps(measure(who, arguments)))
        return

    def run(who: str, arguments: list) -> dict | None:
        command = [sys.executable, __file__, "--child", json.dumps([who, *arguments])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout)
        if who == "torch" and "No module named 'torch'" in done.stderr:
            return None
        sys.exit(done.stderr)

    for workload in args.workload or WORKLOADS:
        name, size, classes, batch = WORKLOADS[workload]
        arguments = [name, size, classes, args.batch or batch, args.heads, args.threads]
        rounds = [(run("ours", arguments), run("torch", arguments)) for _ in range(args.rounds)]
        ours = [mine for mine, _ in rounds if mine]
        text = f"{statistics.median(m['seconds'] for m in ours) * 1e3:.0f} ms, peak {ours[0]['mb']:.0f} MB"
        pairs = [(mine, other) for mine, other in rounds if mine and other]
        if pairs:
            ratio = statistics.median(mine["seconds"] / other["seconds"] for mine, other in pairs)
            seconds = statistics.median(other["seconds"] for _, other in pairs)
            text += f"; PyTorch eager, channels_last {seconds * 1e3:.0f} ms, peak {pairs[0][1]['mb']:.0f} MB"
            text += f"; ratio {ratio:.2f}"
        print(f"{workload}, batch {arguments[3]}, {args.threads} threads: step {text}")


if __name__ == "__main__":
    main()
