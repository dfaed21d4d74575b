"""Time and memory, each network in a process of its own: `python -m benchmarks.measure JOB` is that process, and with
`in-turn` in front of JOB one that takes a call at a time.

Only the network that is measured is imported there: PyTorch brings threads and some hundred megabytes of libraries, and
importing minigrad makes glibc keep freed memory. The peers get the same setting through KEEP_MEMORY: it makes PyTorch
faster too, so without it a ratio would tell of allocators.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

PEERS = {
    "ours": "minigrad",
    "torch": "PyTorch, NCHW",
    "torch_channels_last": "PyTorch, channels_last",
    "torch_compile": "PyTorch, compiled",
}
# On a GPU: a name of the above, a precision, and "graph" where a call is recorded once and replayed as a CUDA graph.
GPU_PEERS = {
    f"{who}_{precision}{graph}": f"{PEERS[who]}, {precision}{graph.replace('_', ', ')}"
    for who in ("ours", "torch_channels_last", "torch")  # in the order in which they are measured while there is time
    for graph in ("", "_graph")
    for precision in ("tf32", "float32", "bf16")  # the last is PyTorch's autocast
    if (who, precision) != ("ours", "bf16")
}
NAMES = PEERS | GPU_PEERS
MEASURES = ("evaluate", "forward", "step")  # in the order in which they need more memory
TITLES = {"evaluate": "evaluation", "forward": "forward", "step": "training step"}
HEAD_WEIGHT = 0.3
KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"}
WARM_UP = 5  # calls on a GPU that are not counted: they compile, tune, fill the memory pool, record a graph
Record = dict[str, Any]


class Form(NamedTuple):
    """What a name of NAMES stands for."""

    network: str
    precision: str = "float32"
    graph: bool = False

    @classmethod
    def of(cls, who: str) -> Form:
        if who in PEERS:
            return cls(who)
        network, _, precision = who.removesuffix("_graph").rpartition("_")
        return cls(network, precision, who.endswith("_graph"))

    @property
    def ours(self) -> bool:
        return self.network == "ours"


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


class Network:
    """What there is to measure. `loss` builds the graph, `update` is SGD with momentum and forgets the gradients."""

    set_threads: Callable[[int], None]
    loss: Callable[[], Any]
    update: Callable[[], None]
    forward: Callable[[], Any]  # in training mode, nothing recorded
    evaluate: Callable[[], Any]  # in evaluation mode, nothing recorded
    kept_bytes: Callable[[], int]  # what is held between forward and backward, without the parameters
    # On a GPU
    wait: Callable[[], None]  # until it has done all it was told
    device_mb: Callable[[], float]  # the most that the framework has taken of its memory since `trim`, MiB
    trim: Callable[[], None]  # give back what is unused

    def step(self) -> None:
        self.loss().backward()
        self.update()

    def parts_of_step(self) -> dict[str, float]:
        """Take a step; the seconds of its parts."""
        start = time.perf_counter()
        loss = self.loss()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.update()
        return {"forward": forward - start, "backward": backward - forward, "update": time.perf_counter() - backward}


class Job(NamedTuple):
    """What one process measures: for every workload in turn every measure, for every number of threads in turn."""

    who: str
    works: list[Workload]
    threads: list[int]
    measures: list[str]
    repeats: int
    keep_memory: bool = True  # False: a peer with the C library's own setting
    device: int | None = None  # which GPU; None: the CPU
    python: str = sys.executable  # minigrad's interpreter; a peer runs in this one

    def run(self) -> list[Record]:
        """seconds: the median over the repeats; mb: the process's peak so far; start_mb: before the first call;
        bare_mb: before the first network was built. On a GPU see `on_device`."""
        if self.device is not None:
            return self.on_device()
        records: list[Record] = []
        build, bare_mb = self.builder(), peak_mb()
        for work in self.works:
            if self.measures == ["profile"]:
                profile = importlib.import_module("benchmarks.profiling").profile
                records += [profile(work, n, self.repeats) for n in self.threads]
                continue
            network = build(self.who, work)
            start_mb, what = peak_mb(), {"who": self.who, **work._asdict()}
            for measure in self.measures:
                if measure == "kept":
                    records.append(what | {"measure": measure, "bytes": network.kept_bytes()})
                    continue
                for n in self.threads:
                    network.set_threads(n)
                    if measure == "parts_of_step":
                        seconds: Any = median_times(network.parts_of_step, self.repeats)
                    else:
                        seconds = median_time(getattr(network, measure), self.repeats)
                    records.append(what | {"measure": measure, "threads": n, "seconds": seconds})
                    records[-1] |= {"mb": peak_mb(), "start_mb": start_mb, "bare_mb": bare_mb}
        return records

    def builder(self) -> Callable[..., Network]:
        """What makes the network; its framework is imported here, and no other."""
        build: Callable[..., Network] = importlib.import_module(
            "benchmarks.ours" if Form.of(self.who).ours else "benchmarks.peers"
        ).build
        return build

    def in_turn(self) -> None:
        """Make the call of each measure that a line of the standard input names, and say what it took."""
        (work,), (n,) = self.works, self.threads
        network = self.builder()(self.who, work)
        network.set_threads(n)
        record: Record = {"who": self.who, **work._asdict(), "threads": n, "start_mb": peak_mb()}
        for line in sys.stdin:
            measure = line.strip()
            start = time.perf_counter()
            getattr(network, measure)()
            took = {"measure": measure, "seconds": time.perf_counter() - start, "mb": peak_mb()}
            print(json.dumps(record | took), flush=True)

    def process(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """The command that does this, or what the arguments say, and its environment."""
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        ours = Form.of(self.who).ours
        theirs = self.keep_memory and not ours
        command = [self.python if ours else sys.executable, "-m", "benchmarks.measure", *arguments]
        return command, os.environ | {"PYTHONPATH": path} | (KEEP_MEMORY if theirs else {})

    def on_device(self) -> list[Record]:
        """seconds: of a call among many; host_seconds: until the host has told the GPU all of it; mb: what the pool of
        the GPU's memory holds after the calls; start_mb: before the first call."""
        if self.measures[0] in ("ceilings", "profile"):
            gpu = importlib.import_module("benchmarks.gpu_profiling")
            return [getattr(gpu, self.measures[0])(self)]
        build = self.builder()
        records: list[Record] = []
        for work in self.works:
            gc.collect()  # networks before this one, whose closures hold each other
            network: Network = build(self.who, work, self.device)
            network.trim()
            start_mb = network.device_mb()
            for measure in self.measures:
                if measure == "trace":
                    traced = importlib.import_module("benchmarks.trace").traced(
                        network.step, network.wait, self.repeats
                    )
                    records.append({"who": self.who, **work._asdict(), **traced})
                    continue
                seconds, host = steady_times(getattr(network, measure), network, self.repeats)
                records.append({"who": self.who, **work._asdict(), "measure": measure, "seconds": seconds})
                records[-1] |= {"host_seconds": host, "mb": network.device_mb(), "start_mb": start_mb}
        return records


def steady_times(call: Callable[[], Any], network: Network, repeats: int) -> tuple[float, float]:
    """Seconds of a call on a GPU that is kept busy, and of telling it to: medians, of what follows upon warm-up.

    The first are of so many calls that they take a tenth of a second; only at their end the host waits.
    """

    def of(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        network.wait()
        return (time.perf_counter() - start) / count

    for _ in range(WARM_UP if repeats > 1 else 1):
        of(1)
    network.trim()
    count = max(1, min(1000, round(0.1 / of(1))))
    seconds = statistics.median([of(count) for _ in range(repeats)])
    hosts = []
    for _ in range(2 * repeats - 1):
        start = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - start)
        network.wait()
    return seconds, statistics.median(hosts)


def median_time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, by `median_times`."""

    def timed() -> dict[str, float]:
        start = time.perf_counter()
        call()
        return {"": time.perf_counter() - start}

    return median_times(timed, repeats)[""]


def median_times(timed: Callable[[], dict[str, float]], repeats: int) -> dict[str, float]:
    """Of each part of a call that times itself: the median of so many calls, or of as many as fit into a third of a
    second; up to two before them are not counted."""
    times: list[dict[str, float]] = []
    for _ in range(min(repeats, 2)):
        timed()
    while len(times) < repeats or (sum(sum(parts.values()) for parts in times) < 0.3 and len(times) < 50):
        times.append(timed())
    return {part: statistics.median(parts[part] for parts in times) for part in times[0]}


def peak_mb() -> float:
    """The most memory that this process has had resident, in MiB."""
    with contextlib.suppress(OSError):  # Linux's ru_maxrss begins at what the parent had
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class Failed(Exception):
    """A process ended badly; the text is the last line it said."""


def start(job: Job) -> list[Record]:
    """Run a job in a fresh process; raises Failed."""
    ((_, found),) = start_each([job])
    if isinstance(found, Failed):
        raise found
    return found


def start_each(jobs: list[Job], seconds: float | None = None) -> Iterator[tuple[Job, list[Record] | Failed]]:
    """Run jobs one after the other in one process of their own; after one that fails, a fresh process takes the others.

    jobs      of one framework
    seconds   for all of them: what takes longer has failed
    """
    end = time.perf_counter() + (seconds or 1e9)
    while jobs:
        command, environment = jobs[0].process(json.dumps(jobs))
        said, code = "", 0
        try:
            limit = max(end - time.perf_counter(), 0.01) if seconds else None
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
            out, said, code = done.stdout, done.stderr.strip(), done.returncode
        except subprocess.TimeoutExpired as error:
            partly = error.stdout or ""  # bytes, whatever was asked for
            out = partly.decode() if isinstance(partly, bytes) else partly
            said, code = f"not done within {seconds:.3g} seconds", 1
        found = [json.loads(line) for line in out.splitlines() if line.startswith("[{")]
        yield from zip(jobs, found, strict=False)
        jobs = jobs[len(found) :]
        if jobs:
            yield jobs[0], failure(jobs[0], said, code)
            jobs = jobs[1:]


def failure(job: Job, said: str, code: int | None) -> Failed:
    last = said.splitlines()[-1] if said else f"exit code {code}"
    return Failed(f"{NAMES[job.who]}, {job.works[0].model}: {last}")


class InTurn:
    """A process that has one network, and makes a call when it is asked to: so several of them take turns, and what
    the machine does beside meets all alike."""

    def __init__(self, job: Job):
        self.job, (command, environment) = job, job.process("in-turn", json.dumps(job))
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe that nobody reads ends in a standstill
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
        )

    def ask(self, measure: str) -> Record:
        """The record of one call; raises Failed where the process has ended."""
        assert self.child.stdin
        assert self.child.stdout
        with contextlib.suppress(BrokenPipeError):
            print(measure, file=self.child.stdin, flush=True)
        line = self.child.stdout.readline()
        if not line:
            code = self.child.wait()
            self.said.seek(0)
            raise failure(self.job, self.said.read().strip(), code)
        record: Record = json.loads(line)
        return record

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for file in (self.child.stdin, self.child.stdout, self.said):
            with contextlib.suppress(BrokenPipeError):
                file.close()  # type: ignore[union-attr]


def installed() -> list[str]:
    """Ours, and the peers that are there, on the CPU."""
    return list(PEERS) if importlib.util.find_spec("torch") else ["ours"]


def machine(gpu: str = "") -> Record:
    """When, on what, with what."""
    versions = {"python": platform.python_version()}
    if gpu:
        versions["cupy"] = sys.modules["cupy"].__version__
    for package in ("numpy", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    blas = [f"{b['internal_api']} {b['version']} ({b.get('architecture')})" for b in threadpool_info()]
    return ({"gpu": gpu} if gpu else {}) | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu,
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "blas": ", ".join(blas) or np.__config__.show(mode="dicts")["Build Dependencies"]["blas"]["name"],
        "versions": versions,
    }


def interpreter(python: str) -> Record:
    """Its version and NumPy's; raises Failed where it cannot run minigrad."""
    code = (
        "import json, platform, sysconfig, numpy, threadpoolctl, tqdm; print(json.dumps({'python':"
        "platform.python_version() + ' free-threaded' * bool(sysconfig.get_config_var('Py_GIL_DISABLED')),"
        "'numpy': numpy.__version__}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise Failed(f"{python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise Failed(f"{python} cannot run minigrad: {done.stderr.strip().splitlines()[-1]}")
    versions: Record = json.loads(done.stdout)
    return versions


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    in_turn = sys.argv[1] == "in-turn"
    for who, works, *rest in [json.loads(sys.argv[2])] if in_turn else json.loads(sys.argv[1]):
        job = Job(who, [Workload(*work) for work in works], *rest)
        if in_turn:
            job.in_turn()
        else:
            print(json.dumps(job.run()), flush=True)
