"""Everything the commands print: results on standard output; warnings, errors and progress bars on standard error.

No output stream may end a training. A stream can be closed, full, or read by a program that has left (`| head`); then
its lines are lost and counted, and the program goes on. Every line is escaped (`minigrad.errors.printable`), so that
the name of a picture cannot move the cursor, ring the bell or fake a second line.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from minigrad.errors import printable


class Stream:
    """Standard output or standard error as it is at the moment of writing; what cannot be written is counted."""

    def __init__(self, name: str):
        self.name = name  # "stdout" or "stderr"
        self.lost = 0  # writes that failed

    def write(self, text: str) -> None:
        try:
            getattr(sys, self.name).write(text)
        except (OSError, ValueError, AttributeError):  # full or without a reader; closed; None
            self.lost += 1

    def flush(self) -> None:
        try:
            getattr(sys, self.name).flush()
        except (OSError, ValueError, AttributeError):
            self.lost += 1

    def isatty(self) -> bool:
        """Whether a terminal shows the stream: no if the stream cannot tell."""
        try:
            return bool(getattr(sys, self.name).isatty())
        except (OSError, ValueError, AttributeError):
            return False


output, errors = Stream("stdout"), Stream("stderr")


def say(line: str = "") -> None:
    """Print one line on standard output."""
    output.write(f"{printable(line)}\n")
    output.flush()


def warn(line: str) -> None:
    """Print one line on standard error, above a progress bar if there is one."""
    with tqdm.external_write_mode(file=errors):
        errors.write(f"{printable(line)}\n")
    errors.flush()


def progress(title: str, total: int | None, *, unit: str, quiet: bool, initial: int = 0, **options: Any) -> tqdm:
    """A progress bar on standard error, which vanishes at its end. In a file, a state of the bar every ten seconds."""
    seconds = 0.1 if errors.isatty() else 10.0
    return tqdm(desc=printable(title), total=total, initial=initial, unit=unit, disable=quiet, leave=False,
                dynamic_ncols=errors.isatty(), file=errors, mininterval=seconds, **options)  # fmt: skip
