"""What the tests of the benchmarks share; the fixture `run`, which calls the command, is in conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.vocabulary import Workload

TINY = Workload("googlenet_small", 8, 10, 2)
Run = Callable[..., tuple[int, str, str]]
