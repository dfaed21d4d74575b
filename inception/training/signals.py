"""Signals as requests to a training: stop and save, or save and go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_STOP = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_SAVE = "SIGUSR1"


class Signals:
    """What signals have asked for. They are listened to within `listening`, and in the main thread only.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP   the first calls `stop` with its number: the training finishes its step and saves.
                                       The second raises KeyboardInterrupt, after the file that is being written. The
                                       third ends the process
    SIGUSR1                            calls `save`: the training saves after its step and goes on
    A signal that was ignored stays ignored, as nohup wants it.
    """

    def __init__(self, stop: Callable[[int], None], save: Callable[[], None]):
        self.stop, self.save = stop, save
        self.first = 0  # number of the signal that stops the training
        self.writing = 0  # nested blocks of `finished`
        self.late = False  # a second signal came while a file was written

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals are requests."""
        if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread only
            yield
            return
        handlers: dict[str, Any] = dict.fromkeys(_STOP, self._stop) | {_SAVE: lambda *_: self.save()}
        numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
        before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        for number, handler in numbers.items():
            if before[number] != signal.SIG_IGN:
                signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Within the block a file is written: a second signal waits for its end."""
        self.writing += 1
        try:
            yield
        finally:
            self.writing -= 1
        if self.late and not self.writing:
            raise KeyboardInterrupt

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.first:
            self.first = number
            self.stop(number)
            _tell("finishing the step and saving; once more stops at once, without saving")
            return
        signal.signal(number, signal.SIG_DFL)
        if not self.writing:
            raise KeyboardInterrupt
        self.late = True
        _tell("stopping when the file is written")


def _tell(line: str) -> None:
    """Not print: the signal may have come in the middle of one."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
