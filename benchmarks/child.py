"""The child process: `python -m benchmarks.child run|in-turn JOBS`. Each job imports the framework that it measures.

`run` makes all measurements of every job. `in-turn` makes one call for each line of the standard input.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.clock import median_time, median_times, peak_mb, seconds_of, steady_times
from benchmarks.vocabulary import Job, Network, Record, Workload


def builder(job: Job) -> Callable[[Workload], Network]:
    """Import the framework of a job's contender; return the function that makes its network."""
    contender, device = job.contender, job.device
    if job.checkout:
        sys.path.insert(0, job.checkout)
    if contender.kind == "torch":
        from benchmarks import torch_peers

        return lambda work: torch_peers.build(contender, work, device)
    if not contender.ours:
        from benchmarks import engines

        return lambda work: engines.build(contender.kind, job.model_file, work)
    if device is not None:
        from benchmarks import ours_gpu

        return lambda work: ours_gpu.build(contender, work, device)
    from benchmarks.ours import Ours, use_kernels

    use_kernels(contender.kernels)
    return Ours


def run(job: Job) -> list[Record]:
    """seconds: the median over the repeats; mb: the process's peak so far; start_mb: before the first call;
    bare_mb: before the first network was built. On a GPU see `run_on_gpu`."""
    if job.device is not None:
        return run_on_gpu(job)
    if job.measures == ["profile"]:
        from benchmarks.host_profile import profile

        return [profile(work, n, job.repeats, job.contender.kernels) for work in job.works for n in job.threads]
    records: list[Record] = []
    build, bare_mb = builder(job), peak_mb()
    for work in job.works:
        network = build(work)
        start_mb, row = peak_mb(), {"who": job.who, **work._asdict()}
        for measure in job.measures:
            if measure == "kept":
                records.append(row | {"measure": measure, "bytes": network.kept_bytes()})
                continue
            for n in job.threads:
                network.set_threads(n)
                if measure == "parts_of_step":
                    seconds: Any = median_times(network.parts_of_step, job.repeats)
                else:
                    seconds = median_time(getattr(network, measure), job.repeats)
                records.append(row | {"measure": measure, "threads": n, "seconds": seconds})
                records[-1] |= {"mb": peak_mb(), "start_mb": start_mb, "bare_mb": bare_mb}
    return records


def run_on_gpu(job: Job) -> list[Record]:
    """seconds: of a call among many; host_seconds: in which the host launches it; mb: the framework's GPU memory after
    the calls; start_mb: before the first call."""
    if job.measures[0] in ("ceilings", "profile"):
        from benchmarks import gpu_profile

        return [gpu_profile.ceilings(job) if job.measures[0] == "ceilings" else gpu_profile.profile(job)]
    build = builder(job)
    records: list[Record] = []
    for work in job.works:
        gc.collect()  # earlier networks, whose closures refer to each other
        network = build(work)
        network.trim()
        start_mb, row = network.device_mb(), {"who": job.who, **work._asdict()}
        for measure in job.measures:
            if measure == "trace":
                from benchmarks.trace import traced

                records.append(row | traced(network.step, network.wait, job.repeats))
                continue
            seconds, host = steady_times(getattr(network, measure), network, job.repeats)
            records.append(row | {"measure": measure, "seconds": seconds, "host_seconds": host})
            records[-1] |= {"mb": network.device_mb(), "start_mb": start_mb}
    return records


def in_turn(job: Job) -> None:
    """For each line of the standard input, "MEASURE" or "first_step FILE", make the call and print its record."""
    (work,), (n,) = job.works, job.threads
    network = builder(job)(work)
    network.set_threads(n)
    record: Record = {"who": job.who, **work._asdict(), "threads": n, "start_mb": peak_mb()}
    for line in sys.stdin:
        measure, *file = line.rstrip("\n").split(" ", 1)
        seconds = seconds_of(lambda: getattr(network, measure)(*file))  # noqa: B023  # called at once
        print(json.dumps(record | {"measure": measure, "seconds": seconds, "mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    for who, works, *rest in json.loads(sys.argv[2]):
        job = Job(who, [Workload(*work) for work in works], *rest)
        if sys.argv[1] == "in-turn":
            in_turn(job)
        else:
            print(json.dumps(run(job)), flush=True)
