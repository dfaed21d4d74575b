"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from minigrad.errors import MinigradError


class WeightsError(MinigradError, ValueError):
    """A weights file cannot be read or written, or is not what is wanted."""


def replace_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write beside `path`, and put the file in its place once it is on the disk: there is the old one or the new.

    Raises WeightsError naming the file if that fails, for example for want of space; the old one is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)  # the name, too, must survive a power cut
    except OSError as error:
        raise WeightsError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_place(path: Path) -> None:
    """Make the folder of `path` and write a file there once: before training, not after it, is the time to fail.

    Raises WeightsError if no file can be written to `path`.
    """
    if path.exists() and not path.is_file():  # /dev/null too must not be replaced
        raise WeightsError(f"{path} cannot be written (it is a directory or a device): name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        file = next((place for place in path.parents if place.exists() and not place.is_dir()), None)
        reason = error.strerror if file is None else f"{file} is a file, not a directory"
        raise WeightsError(f"{path} cannot be written ({reason}): name another place") from None
