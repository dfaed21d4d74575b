"""The safetensors format: a header of JSON that says where each array lies, then the bytes of all of them.

    8 bytes   n, the length of the header, little-endian
    n bytes   {"name": {"dtype": "F32", "shape": [64, 3, 7, 7], "data_offsets": [0, 37632]}, …,
               "__metadata__": {"key": "text"}}
    the rest  the arrays in row-major order; offsets count from here

A reader must expect anything of the header. Here offsets have to cover the rest of the file without holes or
overlaps, so what is read takes as much memory as the file has bytes.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inception.files import open_file, parse_json, replace_file
from inception.weights.npz import WeightsError

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "|b1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items() if code != "BF16"}
_LONGEST_HEADER = 4 << 20  # bytes; those of the largest networks here have 80,000


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays and texts by `replace_file`; the same content gives the same bytes."""
    # Wide elements first keep each array aligned; readers of other projects want the bytes without gaps.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        if (code := _CODES.get(array.dtype.newbyteorder("<"))) is None:
            raise WeightsError(f"{path}: {name} is {array.dtype}, which safetensors has no name for")
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)

    replace_file(path, write)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays by name, and the texts. bfloat16 becomes float32, which holds the same numbers.

    Raises WeightsError naming the file, and the array, if anything in it is not as the format says.
    """
    try:
        with open_file(path, WeightsError) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise WeightsError(
                    f"{path}: its header would have {length:,} bytes, the file has {size:,}: it is cut short, or no "
                    "safetensors file"
                )
            if length > _LONGEST_HEADER:
                raise WeightsError(f"{path}: a header of {length:,} bytes; {_LONGEST_HEADER:,} would be long")
            header = _header(path, file.read(length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
                raise WeightsError(f"{path}: its __metadata__ is not names with texts")
            places = _places(path, header, size - 8 - length)
            return {name: _read(file, code, shape) for name, (code, shape) in places.items()}, metadata
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None


def _header(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in it")
        return found

    try:
        header = parse_json(text, object_pairs_hook=once)
    except ValueError as error:
        raise WeightsError(f"{path}: its header is damaged ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: its header is no table of arrays")
    return header


def _places(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[str, list[int]]]:
    """(dtype, shape) of each array in the order of the bytes. WeightsError unless they fill `size` bytes exactly."""
    spans, places = {}, {}
    for name, entry in header.items():
        try:
            code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, end]
            wide = np.dtype(_DTYPES[code]).itemsize
            if (
                type(shape) is not list
                or len(shape) > 32
                or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers)
            ):
                raise ValueError
            if 0 in shape and math.prod(n or 1 for n in shape) * wide >= 1 << 63:  # NumPy cannot shape it
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path}: its header does not say what {name[:80]!r} is: {str(entry)[:80]}") from None
        if math.prod(shape) * wide != end - start:
            raise WeightsError(
                f"{path}: {name[:80]!r} of shape {str(tuple(shape))[:80]} in {code} has {end - start:,} bytes, "
                f"it would need {str(math.prod(shape) * wide)[:40]}"
            )
        spans[name], places[name] = (start, end), (code, shape)
    before, last = 0, "the header"
    ordered = sorted(places, key=spans.__getitem__)
    for name in ordered:
        start, end = spans[name]
        if start != before:
            how = "overlaps" if start < before else "leaves a hole after"
            raise WeightsError(f"{path}: {name[:80]!r} at {start:,} {how} {last[:80]!r}, which ends at {before:,}")
        before, last = end, name
    if before != size:
        kind = "it is cut short" if before > size else "there is more behind them"
        raise WeightsError(f"{path}: its arrays have {before:,} bytes, the file has {size:,} for them: {kind}")
    return {name: places[name] for name in ordered}


def _read(file: BinaryIO, code: str, shape: list[int]) -> np.ndarray:
    array = np.empty(shape, _DTYPES[code])
    file.readinto(array.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
    return widened(array) if code == "BF16" else array


def widened(halves: np.ndarray) -> np.ndarray:
    """Numbers in bfloat16, given as uint16, in float32: the upper half of its bits."""
    return (halves.astype("<u4") << 16).view("<f4")
