"""A run so cheap that it can be stopped, killed and damaged many times over: see tiny_run."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import options

from inception.training import Training, run
from minigrad import num_threads, set_num_threads

run_module = importlib.import_module("inception.training.run")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_module, "create_model", tiny_run.make_model)
    monkeypatch.setattr(run_module, "open_data", tiny_run.make_data)
    before = num_threads()
    yield
    set_num_threads(before)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "create_model", tiny_run.make_model)
        patch.setattr(run_module, "open_data", tiny_run.make_data)
        out = tmp_path_factory.mktemp("whole") / "run"
        run(options(out))
    return out


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask a training to stop once it has taken so many steps, as a signal would."""

    def arrange(steps: int, number: int = signal.SIGTERM) -> None:
        plain = Training._update

        def update(self: Training) -> None:
            plain(self)
            if self.step + 1 == steps:
                self.stopping = number

        monkeypatch.setattr(Training, "_update", update)

    return arrange
