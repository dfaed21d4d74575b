"""Child processes, from the parent's side: each contender runs in a process of its own, see `child`.

PyTorch brings threads and some hundred megabytes of libraries, so no process imports more than the contender that it
measures. Importing minigrad makes glibc keep freed memory; peers get the same setting through KEEP_MEMORY. It makes
PyTorch faster too, so without it a ratio would compare allocators.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.vocabulary import Failed, Job, Record

KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"}


def command(job: Job, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line of a job's child process, and its environment."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    peer = not job.contender.ours
    python = sys.executable if peer else job.python
    # -P: the current folder, which may be another checkout, is not searched for modules.
    line = [python, "-P", "-m", "benchmarks.child", *arguments]
    return line, os.environ | {"PYTHONPATH": path} | (KEEP_MEMORY if peer and job.keep_memory else {})


def failure(job: Job, said: str, code: int | None) -> Failed:
    last = said.splitlines()[-1] if said else f"exit code {code}"
    return Failed(f"{job.contender.title}, {job.works[0].model}: {last}")


def start(job: Job) -> list[Record]:
    """Run a job in a fresh process; raises Failed."""
    ((_, found),) = start_each([job])
    if isinstance(found, Failed):
        raise found
    return found


def start_each(jobs: list[Job], seconds: float | None = None) -> Iterator[tuple[Job, list[Record] | Failed]]:
    """Run jobs one after the other in one child process. After a job that fails, a fresh process takes the others.

    jobs      of one framework
    seconds   the limit for all of them; later jobs fail
    """
    end = time.perf_counter() + (seconds or 1e9)
    while jobs:
        line, environment = command(jobs[0], "run", json.dumps(jobs))
        try:
            limit = max(end - time.perf_counter(), 0.01) if seconds else None
            done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=limit)
            out, said, code = done.stdout, done.stderr.strip(), done.returncode
        except subprocess.TimeoutExpired as error:
            partly = error.stdout or ""  # bytes, even with text=True
            out = partly.decode() if isinstance(partly, bytes) else partly
            said, code = f"not done within {seconds:.3g} seconds", 1
        found = [json.loads(line) for line in out.splitlines() if line.startswith("[{")]
        yield from zip(jobs, found, strict=False)
        jobs = jobs[len(found) :]
        if jobs:
            yield jobs[0], failure(jobs[0], said, code)
            jobs = jobs[1:]


class InTurn:
    """A child process that holds one network and makes one call at a time, when it is asked to.

    Several of them take turns, so a disturbance of the machine meets all of them alike.
    """

    def __init__(self, job: Job):
        self.job, (line, environment) = job, command(job, "in-turn", json.dumps([job]))
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # the child would block on a full pipe
        self.child = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
        )

    def ask(self, measure: str) -> Record:
        """The record of one call; raises Failed where the process has ended."""
        assert self.child.stdin
        assert self.child.stdout
        with contextlib.suppress(BrokenPipeError):
            print(measure, file=self.child.stdin, flush=True)
        for line in self.child.stdout:
            if line.startswith("{"):  # a library may print too
                record: Record = json.loads(line)
                return record
        code = self.child.wait()
        self.said.seek(0)
        raise failure(self.job, self.said.read().strip(), code)

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for file in (self.child.stdin, self.child.stdout, self.said):
            with contextlib.suppress(BrokenPipeError):
                file.close()  # type: ignore[union-attr]
