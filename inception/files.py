"""Files: opened with care, bounded before they are read, replaced as a whole. Every reader and writer builds on this.

A file from outside can lie. Before a reader allocates, decodes or nests anything on the word of a file, it asks
`allow`; it opens regular files only, so that no pipe or device can block it or never end.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from minigrad.errors import MinigradError

FREE_BYTES = 64 << 20  # what any file may ask for
EXPANSION = 64  # and so many times its own size: images and compressed arrays expand, bombs expand a thousandfold
DEEPEST = 64  # levels of nesting that any description may have


class FileError(MinigradError, ValueError):
    """A file cannot be read or written, or is not what is wanted."""


def open_file(path: Path, error: type[MinigradError] = FileError) -> BinaryIO:
    """Open a regular file to read its bytes; a pipe, a device or a directory is refused at once.

    Raises `error` naming the file and the reason.
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for one.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except (OSError, ValueError) as reason:  # ValueError: a zero byte in the path
        raise error(f"{path}: cannot be read ({getattr(reason, 'strerror', None) or reason})") from None
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise error(f"{path}: {kind}, not a file: name a file")


def allow(
    path: Path,
    wanted: int,
    size: int,
    content: str,
    error: type[MinigradError] = FileError,
    remedy: str = "it is damaged or hostile",
) -> None:
    """Refuse a file that makes its reader allocate far more than the file holds.

    wanted    bytes that reading would allocate, as the file says
    size      bytes of the file
    content   what would need them, for the message
    remedy    for the message too: what to do, where honest files can be so
    Raises `error` beyond FREE_BYTES + EXPANSION · size.
    """
    if wanted > FREE_BYTES + EXPANSION * size:
        raise error(f"{path}: {content} would take {wanted:,} bytes, the file has {size:,}: {remedy}")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """What a description in JSON says; `options` are those of json.loads.

    Raises ValueError if it is no JSON, a number in it has thousands of digits, or it is nested beyond DEEPEST.
    """
    try:
        found = json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [found]
    for _ in range(DEEPEST):
        level = [x for value in level if isinstance(value, (dict, list))
                 for x in (value.values() if isinstance(value, dict) else value)]  # fmt: skip
        if not level:
            return found
    raise ValueError("it is nested too deeply")


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write beside `path`, then put the new file in the place of the old one: readers see the old file or the new one.

    Raises FileError naming the file if that fails, for example for want of space; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Let the new name survive a power cut, on file systems that can do so. Others answer EINVAL: the file is whole."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        with suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_place(path: Path) -> None:
    """Make the directory of `path` and write a file there once: before training, not after it, is the time to fail.

    Raises FileError if no file can be written to `path`.
    """
    if path.exists() and not path.is_file():  # /dev/null too must not be replaced
        raise FileError(f"{path} cannot be written (it is a directory or a device): name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        file = next((place for place in path.parents if place.exists() and not place.is_dir()), None)
        reason = error.strerror if file is None else f"{file} is a file, not a directory"
        raise FileError(f"{path} cannot be written ({reason}): name another place") from None
