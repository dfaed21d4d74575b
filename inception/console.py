"""Everything the commands print: results on standard output; warnings, errors and progress bars on standard error.

No output stream may end a training. A stream can be closed, full, or read by a program that has left (`| head`); then
its lines are lost and counted, and the program goes on. Every line is escaped (`minigrad.errors.printable`), so that
the name of a picture cannot move the cursor, ring the bell or fake a second line.
"""

from __future__ import annotations

import os
import select
import sys
from typing import Any

from tqdm import tqdm

from minigrad.errors import printable


class Stream:
    """Standard output or standard error as it is at the moment of writing; what cannot be written is counted."""

    def __init__(self, name: str, title: str):
        self.name, self.title = name, title
        self.lost = 0  # writes that failed

    def write(self, text: str) -> None:
        """Write and flush, or count one write more that failed."""
        try:
            stream = getattr(sys, self.name)
            stream.write(text)
            getattr(stream, "flush", bool)()
        except Exception:  # full, closed, None, without its reader; a stand-in can raise anything
            self.lost += 1

    def flush(self) -> None:
        """`write` has done it."""

    def isatty(self) -> bool:
        """Whether a terminal shows the stream: no if the stream cannot tell."""
        try:
            return bool(getattr(sys, self.name).isatty())
        except Exception:
            return False

    def fileno(self) -> int:
        """For tqdm, which asks the terminal how wide it is. Raises what the stream raises."""
        return int(getattr(sys, self.name).fileno())

    @property
    def encoding(self) -> str:
        """For tqdm, which draws with blocks where they can be encoded."""
        return getattr(getattr(sys, self.name), "encoding", None) or "ascii"


output, errors = Stream("stdout", "standard output"), Stream("stderr", "standard error")


def say(line: str = "") -> None:
    """Print one line on standard output."""
    output.write(f"{printable(line)}\n")


def warn(line: str) -> None:
    """Print one line on standard error, above a progress bar if there is one."""
    with tqdm.external_write_mode(file=errors):
        errors.write(f"{printable(line)}\n")


def warning(text: str) -> None:
    """Say on standard error what is wrong and does not end the program."""
    warn(f"warning: {text}")


def progress(title: str, total: int | None, *, unit: str, quiet: bool, initial: int = 0, **options: Any) -> tqdm:
    """A progress bar on standard error, which vanishes at its end. In a file, a state of the bar every ten seconds."""
    seconds = 0.1 if errors.isatty() else 10.0
    return tqdm(desc=printable(title), total=total, initial=initial, unit=unit, disable=quiet, leave=False,
                dynamic_ncols=errors.isatty(), file=errors, mininterval=seconds, **options)  # fmt: skip


def is_unread() -> bool:
    """Whether the reader of standard output has gone, as `| head` has when it has seen enough."""
    try:
        poll = select.poll()
        poll.register(output.fileno(), 0)
        return bool(poll.poll(0))  # an error or a hang-up: nothing else was asked for
    except Exception:  # no such call on Windows, no descriptor
        return True


def begin() -> None:
    """Before a command: put /dev/null in the place of standard descriptors that are closed.

    The next file opened would get such a number, and whatever writes to standard error would write into that file.
    """
    output.lost = errors.lost = 0
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def end(*, json: bool = False) -> None:
    """After a command: say what could not be said, on a stream that works; standard output stays JSON if `json`.

    A stream that still fails is turned to /dev/null, for Python's own flush at the end would change the exit code.
    """
    for stream, other in ((output, errors), (errors, output)):
        if stream.lost and not other.lost and not (json and other is output):
            warn_there = warn if other is errors else say
            warn_there(f"warning: {stream.title} could not be written {stream.lost:,} times (closed, full or unread)")
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if name == "stdout" else 2)
        except Exception:  # None, closed, a stand-in
            continue
