"""Shared fixtures: `xp` runs a test once on each backend."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import fake_cupy
import pytest

from minigrad import backend

MODULES = {"numpy": "numpy", "fake_cupy": "cupy", "cupy": "cupy"}


@functools.cache
def reason_against_cupy() -> str:
    """Why the real CuPy cannot be used on this machine; empty if it can. Asked once: it is slow with a GPU."""
    code, sentence = backend.cupy_status()
    return "" if code == "ok" else sentence


@pytest.fixture(params=["numpy", "fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The array module of one backend, which is also where new tensors are made until the test ends.

    numpy       the host
    fake_cupy   a stand-in that refuses what CuPy refuses; it is `cupy` for the time of the test
    cupy        the GPU; skipped with the reason where there is none
    """
    if request.param == "cupy" and reason_against_cupy():
        pytest.skip(reason_against_cupy())
    before = backend.backend()
    if request.param == "fake_cupy":
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    backend.set_backend(MODULES[request.param])
    if request.param == "fake_cupy":
        fake_cupy.SYNCS.clear()  # set_backend's own smoke test reads one number back
    yield importlib.import_module(MODULES[request.param])
    backend.set_backend(before)
