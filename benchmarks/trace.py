"""Every kernel of a step by its own name and time, minigrad's and PyTorch's alike, as PyTorch's profiler sees them.

The profiler listens to CUPTI, NVIDIA's interface for profilers, which reports all that the process runs on the GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.vocabulary import Record


def traced(step: Callable[[], Any], wait: Callable[[], Any], steps: int) -> Record:
    """Per step: `kernels`, each with its name, launches and milliseconds, the slowest first; `copies`, the number of
    times that memory is copied or set; `busy_ms`, the time of all of these."""
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
    """The result of `traced` from events in Chrome's trace format, whose times are microseconds."""
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
