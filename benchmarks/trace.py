"""Every kernel of a step by its own name and time, ours as well as PyTorch's, as PyTorch's profiler sees them.

That listens to CUPTI, NVIDIA's interface for profilers, which tells of all that the process starts on the GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Record


def traced(step: Callable[[], Any], wait: Callable[[], Any], steps: int) -> Record:
    """`kernels`: name, launches and milliseconds per step, the slowest first; `copies`: how often memory is copied or
    set; `busy_ms`: all of these."""
    for _ in range(3):
        step()
    wait()
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        wait()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        return of_events(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"], steps)


def of_events(events: list[Record], steps: int) -> Record:
    """The same from Chrome's trace format, microseconds there."""
    kernels: dict[str, list[float]] = defaultdict(list)
    copies: list[float] = []
    for event in events:
        if event.get("cat") == "kernel":
            kernels[event["name"]].append(event["dur"])
        elif event.get("cat") in ("gpu_memcpy", "gpu_memset"):
            copies.append(event["dur"])
    rows: list[Record] = [
        {"name": n, "launches": len(t) / steps, "ms": sum(t) / steps / 1e3} for n, t in kernels.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    busy = sum(row["ms"] for row in rows) + sum(copies) / steps / 1e3
    launches = sum(row["launches"] for row in rows)
    return {"kernels": rows, "launches": launches, "copies": len(copies) / steps, "busy_ms": busy}
