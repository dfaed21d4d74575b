"""Arrays out of an .npz file whose author nobody knows: every claim of the file is checked before it is followed.

An .npz is a zip archive with a member NAME.npy for each array: a header that gives dtype and shape, then the numbers
(numpy.lib.format). `numpy.load` allocates what the header claims, and returns members without a header as bytes.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from inception.files import FileError, allow, open_file
from minigrad.errors import MinigradError

_HEADER = 12_000  # bytes at the start of a member that hold its header; NumPy reads none above 10,000
_METHODS = (
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
)  # np.savez and np.savez_compressed; LZMA may claim 4 GB of its own
_CHUNK = 1 << 20


def read_arrays(
    path: Path, names: Iterable[str], error: type[MinigradError] = FileError
) -> tuple[dict[str, np.ndarray], int]:
    """Those of `names` that the file holds, and the file's size in bytes. Only numbers and strings; no pickle is read.

    Raises `error` naming the file, and the array if it is one: not an .npz, damaged, or a bomb.
    """
    with open_file(path, error) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = file.seek(0, io.SEEK_END)
                there = set(archive.namelist())
                members = {name: archive.getinfo(f"{name}.npy") for name in names if f"{name}.npy" in there}
                total = sum(member.file_size for member in members.values())
                allow(path, total, size, "its arrays", error, "write it uncompressed, with np.savez")
                arrays = {}
                for name, member in members.items():
                    if member.compress_type not in _METHODS:
                        raise ValueError(f"array {name} is compressed in a way that np.savez_compressed does not use")
                    with archive.open(member) as content:
                        arrays[name] = _read_array(name, content, member.file_size)
                return arrays, size
        except error:
            raise
        except zipfile.BadZipFile as reason:
            raise error(f"{path} is no readable .npz ({reason}): np.savez(path, x_train=…, …) writes one") from None
        except Exception as reason:  # a damaged archive can raise anything
            told = str(reason) if isinstance(reason, ValueError) else repr(reason)
            raise error(f"{path} is no readable .npz of arrays ({told:.200})") from None


def _read_array(name: str, content: IO[bytes], size: int) -> np.ndarray:
    """The array of a member of `size` bytes. Raises ValueError, and whatever a damaged member makes others raise."""
    head = io.BytesIO(content.read(_HEADER))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except Exception:  # NumPy evaluates the header as a literal, which can fail in many ways
        raise ValueError(f"array {name} has no header of numpy.save") from None
    if dtype.hasobject:
        raise ValueError(f"array {name} holds Python objects, which are never read")
    count = math.prod(shape)
    if dtype.kind not in "biufcU" or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"array {name} is of {dtype!s:.40} {shape!s:.60}, not of numbers or strings")
    if count * dtype.itemsize != size - head.tell():
        there = f"{size - head.tell():,}"
        raise ValueError(f"array {name} of {dtype} {shape!s:.60} does not fit its {there} bytes: the file is damaged")
    flat = np.empty(count, dtype)
    into = flat.view(np.uint8)
    at = 0
    for chunk in iter(lambda: head.read() or content.read(_CHUNK), b""):
        into[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    if at != len(into):
        raise ValueError(f"array {name} is cut short")
    if dtype.kind == "U" and (flat.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder)) > 0x10FFFF).any():
        raise ValueError(f"array {name} holds a text of no letters: the file is damaged")
    return flat.reshape(shape, order="F" if fortran else "C")
