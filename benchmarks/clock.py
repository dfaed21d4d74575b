"""How long calls take, and how much memory this process has had."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.vocabulary import Network

WARM_UP = 5  # calls on a GPU that are not counted: they compile, tune, fill the memory pool, record a graph


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_time(call: Callable[[], Any], repeats: int) -> float:
    """The seconds of a call, by `median_times`."""
    return median_times(lambda: {"": seconds_of(call)}, repeats)[""]


def median_times(timed: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """The median seconds of each part of a call that times its own parts.

    The call is made `repeats` times, or up to 50 times while all of them take less than 0.3 seconds. Before, up to
    two calls are made that are not counted.
    """
    times: list[dict[str, float]] = []
    for _ in range(min(repeats, 2)):
        timed()
    while len(times) < repeats or (sum(sum(parts.values()) for parts in times) < 0.3 and len(times) < 50):
        times.append(timed())
    return {part: statistics.median(parts[part] for parts in times) for part in times[0]}


def steady_times(call: Callable[[], Any], network: Network, repeats: int) -> tuple[float, float]:
    """The seconds of a call on a busy GPU, and the seconds in which the host launches it: medians after a warm-up.

    The first figure is the mean of as many calls as take a tenth of a second; the host waits after the last one only.
    """

    def mean(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        network.wait()
        return (time.perf_counter() - start) / count

    for _ in range(WARM_UP if repeats > 1 else 1):
        mean(1)
    network.trim()
    count = max(1, min(1000, round(0.1 / mean(1))))
    seconds = statistics.median([mean(count) for _ in range(repeats)])
    hosts = []
    for _ in range(2 * repeats - 1):
        hosts.append(seconds_of(call))
        network.wait()
    return seconds, statistics.median(hosts)


def peak_mb() -> float:
    """The most memory that this process has had resident, in MiB."""
    with contextlib.suppress(OSError):  # Linux's ru_maxrss begins with the parent's figure
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
