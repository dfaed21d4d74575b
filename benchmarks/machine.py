"""The machine, its processor and the versions that figures belong to."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

from benchmarks.vocabulary import Failed, Record


def machine(gpu: str = "") -> Record:
    """The date, the processor, the system, BLAS and the versions of what is compared."""
    versions = {"python": platform.python_version()}
    if gpu:
        versions["cupy"] = sys.modules["cupy"].__version__
    for package in ("numpy", "numba", "torch", "onnxruntime", "openvino"):
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


def folder_name(where: Record) -> str:
    """The processor's name as the name of a folder: "AMD EPYC" is amd-epyc. The GPU's where there is one."""
    ours = where.get("versions_of_minigrad", {}).get("python", "")
    name = where.get("gpu") or where["cpu"] + (" free-threaded" if "free-threaded" in ours else "")
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def interpreter(python: str) -> Record:
    """The versions of this interpreter and of its NumPy. Raises Failed where it cannot run minigrad."""
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
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
