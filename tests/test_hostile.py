"""Each of the files in `hostile`: one sentence within two seconds and 300 MB, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL.Image")
from hostile import hostile

from inception.data import DataError

SECONDS, MEGABYTES = 2.0, 190.0  # a fresh process has some 110 MB, and 300 MB shall do
CASES = hostile()


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child of this process; None if the child dies."""
    ends = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(ends[1], json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(ends[1])
    with os.fdopen(ends[0], "rb") as answer:
        content = answer.read()
    os.waitpid(child, 0)
    return json.loads(content) if content else None


def read(folder: Path, reader: Callable[[Path], Any]) -> tuple[str, float, float]:
    """What the reader says, the processor's seconds it takes, and how much its process grows meanwhile, MB.

    The process may use 1 GB of addresses more than it has, and ten seconds.
    """
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak()
    os.chdir(folder)
    signal.alarm(30)  # seconds of a clock: for one that waits
    since = time.process_time()
    try:
        reader(folder)
        said = "nothing"
    except DataError as error:
        said = f"DataError: {error}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - since
    return said, seconds, peak() - before


def peak() -> float:
    """The most memory that this process has had, MB."""
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the memory of a process is measured on Linux")
@pytest.mark.parametrize("name", CASES)
def test_one_sentence_in_time_and_memory(tmp_path: Path, name: str) -> None:
    make, file, reader = CASES[name]
    try:
        assert in_child(lambda: bool(make(tmp_path)) or True)  # some need much memory to make
        before = sorted(os.listdir(tmp_path))
        said, seconds, megabytes = in_child(lambda: read(tmp_path, reader)) or ("the process died", 0.0, 0.0)
        print(f"\n{seconds:6.2f} s {megabytes:6.0f} MB  {name}: {said}")
        assert said.startswith("DataError: ")
        assert said.isprintable()
        assert len(said) < 1000
        assert sorted(os.listdir(tmp_path)) == before  # nothing was written or executed
        assert seconds < SECONDS
        assert megabytes < MEGABYTES
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / file)], check=True)  # shutil and pytest recurse in deep folders
