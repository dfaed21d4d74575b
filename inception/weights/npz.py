"""Our own form of weights: one `.npz` with every array of the model, and what is needed to use it again.

The file is read with `allow_pickle=False`: nothing in it is ever executed. A checkpoint (training/checkpoint.py) is
such a file with more in it, and can be used like one.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from inception.files import FileError, open_file, parse_json, replace_file

FORMAT = 1
ABOUT, CHECKPOINT = "about.json", "checkpoint.json"  # what describes weights; what makes a file a checkpoint too


class WeightsError(FileError):
    """A weights file cannot be read or written, or is not what is wanted."""


def write_npz(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write the arrays and what is to be known of them (JSON values), by `replace_file`."""
    write_arrays(path, {**arrays, ABOUT: as_text({"format": FORMAT, **about})})


def as_text(description: dict[str, Any]) -> np.ndarray:
    """A description as an array of one string of bytes, which an .npz can hold in a quarter of a text's room."""
    return np.array(json.dumps(description).encode())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz by `replace_file`."""
    replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name. Raises WeightsError naming the file and what is wrong with it."""
    with open_file(path, WeightsError) as file:
        try:
            if not zipfile.is_zipfile(file):
                raise WeightsError(f"{path}: not a weights file (.npz), or damaged or cut short")
            with zipfile.ZipFile(file) as archive:
                check_plain(path, archive)
                return {
                    member.filename.removesuffix(".npy"): _read_array(path, archive, member)
                    for member in archive.infolist()
                }
        except WeightsError:
            raise
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
        except Exception as error:  # a damaged archive can raise anything, MemoryError included
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise WeightsError(f"{path}: not a readable .npz file ({reason}); it may be damaged or cut short") from None


def _read_array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array. Its header must describe the bytes that follow, before memory is taken for them."""
    name = member.filename.removesuffix(".npy")[:80]
    with archive.open(member) as file:
        try:
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(file)]
            shape, fortran, dtype = read_header(file)
        except (ValueError, KeyError):
            raise WeightsError(f"{path}: {name!r} in it is no array") from None
        size = math.prod(shape) * dtype.itemsize
        if (
            dtype.hasobject
            or min(shape, default=0) < 0
            or size != member.file_size - file.tell()
            or (dtype.itemsize == 0 and shape)
        ):
            raise WeightsError(
                f"{path}: {name!r} is described as {str(shape)[:80]} of {str(dtype)[:40]}, which are "
                f"not the {member.file_size - file.tell():,} bytes that follow"
            )
        array = np.empty(shape, dtype, "F" if fortran else "C")
        content, at = array.reshape(-1, order="A").view(np.uint8), 0
        while part := file.read(1 << 20):  # at the end the checksum is compared
            content[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        return array


def check_plain(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise WeightsError if the members promise more than the file holds, or are compressed: it may be a bomb."""
    promised, there = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if promised > there:
        raise WeightsError(
            f"{path}: its members promise {promised:,} bytes, the file has {there:,}; weights are stored uncompressed"
        )
    if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in archive.infolist()):
        raise WeightsError(f"{path}: its members are compressed; weights are stored uncompressed")


def take_description(path: Path, arrays: dict[str, np.ndarray], name: str, newest: int) -> dict[str, Any]:
    """Remove a description from the arrays and return it. Raises WeightsError if it cannot be understood."""
    try:
        description = parse_json(arrays.pop(name).item())  # bytes, or text as older versions wrote it
        version = description["format"]
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{path}: its description {name!r} is damaged") from None
    check_format(path, version, newest)
    return description


def check_format(path: Path, version: Any, newest: int) -> None:
    """Raise WeightsError for a file of a version that is not known here."""
    if version != newest:
        raise WeightsError(
            f"{path}: written in format {str(version)[:40]}, this version reads format {newest}: update "
            "inception-minigrad"
        )


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and `about`; of a checkpoint those by which a model is used, averaged if it says so.

    Raises WeightsError naming the file and what is wrong with it.
    """
    arrays = read_arrays(path)
    if ABOUT not in arrays:
        raise WeightsError(f"{path}: an .npz file, but not written by this project (it lacks {ABOUT!r})")
    about = take_description(path, arrays, ABOUT, FORMAT)
    if arrays.pop(CHECKPOINT, None) is None:
        return arrays, about
    try:
        if count := about["average_count"]:
            averages = {name.removeprefix("average/"): x for name, x in arrays.items() if name.startswith("average/")}
            return {name: x * (1.0 / count) for name, x in averages.items()}, about
    except (KeyError, TypeError, OverflowError):
        raise WeightsError(f"{path}: its description {ABOUT!r} does not say how its average was taken") from None
    return {name: x for name, x in arrays.items() if "/" not in name}, about
