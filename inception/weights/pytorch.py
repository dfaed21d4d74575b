"""PyTorch's files of weights, `.pth` and `.ckpt`, read and written without PyTorch and without running a pickle.

Such a file has a pickle that says which tensors there are, and their bytes beside it: since PyTorch 1.6 in a zip
archive (NAME/data.pkl, NAME/data/0, NAME/data/1, …), before that one after the other. A pickle is a program, which may
call anything. Here it is interpreted by `_Machine`, which knows dictionaries, lists, numbers, texts and the few names
that tensors are written with, imports nothing, and refuses every other name.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from inception.files import open_file, parse_json, replace_file
from inception.weights.npz import FORMAT, WeightsError, check_format, check_plain
from inception.weights.safetensors import widened

_DTYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1", "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}  # fmt: skip
_STORAGES = {np.dtype(dtype): name for name, dtype in _DTYPES.items() if name != "BFloat16Storage"}
_ENTRIES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
    "state_dict", "model_state_dict", "model", "net", "network", "weights",
)  # fmt: skip
_LONGEST_PICKLE = 1 << 24  # bytes, 64 to an instruction; those of the largest networks here have 100,000
_ABOUT = "inception.json"  # a member of the archive that PyTorch does not look at


class Name(NamedTuple):
    """A class or function that a pickle names. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


class Storage(NamedTuple):
    """The bytes of one tensor or of several: its key in the file, and what they are."""

    key: str
    type: str  # one of _DTYPES
    size: int  # elements


class Stored(NamedTuple):
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class Refused(Exception):
    """The pickle wants something that describes no tensors; the message says what."""


# ---- reading ----


def read_pytorch(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a state dict by name, and `about` if we have written the file; nothing in it is executed.

    A state dict inside a training checkpoint is found under one of `_ENTRIES`; averaged weights come first. The arrays
    may share memory and cannot be written to. bfloat16 becomes float32, which holds the same numbers.
    Raises WeightsError naming the file, and the name that is refused or what is damaged.
    """
    with open_file(path, WeightsError) as file:
        try:
            if file.read(2) == b"PK" or zipfile.is_zipfile(file):  # its first bytes tell it even if it is cut short
                with zipfile.ZipFile(file) as archive:
                    return _read_zip(path, archive)
            file.seek(0)
            return _read_old(path, file), {}
        except WeightsError:
            raise
        except Refused as error:
            raise WeightsError(f"{path}: {error}; nothing of it was run") from None
        except KeyError:  # something that a pickle refers to and does not hold
            raise WeightsError(f"{path}: not a PyTorch file, or damaged") from None
        except Exception as error:  # a damaged file can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise WeightsError(
                f"{path}: not a readable PyTorch file ({reason}); it may be damaged or cut short"
            ) from None


def _read_zip(path: Path, archive: zipfile.ZipFile) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    check_plain(path, archive)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused(f"no PyTorch file: an archive with{' several' if pickles else 'out'} data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise Refused("written on a big-endian machine, which is not read here")
    tensors = _state_dict(_Machine(archive.read(pickles[0]), _zip_storage).run())
    about = parse_json(archive.read(f"{root}{_ABOUT}")) if f"{root}{_ABOUT}" in archive.namelist() else {}
    if not isinstance(about, dict):
        raise Refused(f"its {_ABOUT} is no description")
    if about:
        check_format(path, about.get("format"), FORMAT)
    return _arrays(tensors, lambda storage: archive.read(f"{root}data/{storage.key}")), about


def _read_old(path: Path, file: BinaryIO) -> dict[str, np.ndarray]:
    """The form before PyTorch 1.6: five pickles (magic, version, machine, content, keys), then the storages."""
    seen: dict[str, Storage] = {}

    def old(entry: Any) -> Storage:
        kind, of, key, _, size, view = entry
        if view is not None:
            raise Refused("a storage that is a part of another, as very old PyTorch wrote them")
        seen[key] = _storage(kind, of, key, size)
        return seen[key]

    head = io.BytesIO(file.read(_LONGEST_PICKLE))
    magic, version, machine, content, keys = (_Machine(head, old).run() for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise Refused("a pickle, but not of a PyTorch file")
    if not machine["little_endian"]:
        raise Refused("written on a big-endian machine, which is not read here")
    tensors, places = _state_dict(content), {}
    at, end = head.tell(), path.stat().st_size
    for key in keys:
        if not isinstance(key, str):  # to hash nested tuples may take for ever
            raise Refused(f"a storage named by {type(key).__name__}")
        places[key], size = at + 8, seen[key].size * np.dtype(_DTYPES[seen[key].type]).itemsize
        file.seek(at)
        if int.from_bytes(file.read(8), "little") != seen[key].size or (at := at + 8 + size) > end:
            raise Refused(f"its storage {_brief(key)} is not as long as described, or the file is cut short")

    def read(storage: Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.size * np.dtype(_DTYPES[storage.type]).itemsize)

    return _arrays(tensors, read)


def _zip_storage(entry: Any) -> Storage:
    kind, of, key, _, size = entry
    return _storage(kind, of, key, size)


def _storage(kind: Any, of: Any, key: Any, size: Any) -> Storage:
    if kind != "storage" or not isinstance(of, Name) or of.name not in _DTYPES or not isinstance(key, str):
        raise Refused(f"it refers to {_brief(kind)} of {_brief(of)}, not to the bytes of a tensor")
    if type(size) is not int or size < 0:
        raise Refused(f"a storage of {_brief(size)} elements")
    return Storage(key, of.name, size)


def _state_dict(content: Any) -> dict[str, Stored]:
    """The names with tensors: the content itself, or what it holds under one of `_ENTRIES`, or under two of them."""
    if (found := _find(content)) is not None:
        return found
    if isinstance(content, dict) and not any(isinstance(value, Stored) for value in content.values()):
        counts = [(_brief(name), _tensors(value)) for name, value in content.items()]
        if holders := [f"{name} ({count} tensors)" for name, count in counts if count]:
            raise Refused(f"no state dict under a name that is known here; tensors are in {', '.join(holders[:8])}: "
                          "save one of these alone")  # fmt: skip
    for _ in range(2):
        if isinstance(content, dict):
            content = next((content[k] for k in _ENTRIES if isinstance(content.get(k), dict)), content)
    for name, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(value, Stored):
            raise Refused(f"no state dict: its entry {_brief(name)} is no tensor but {type(value).__name__}")
    raise Refused(f"no state dict: it holds {type(content).__name__}")


def _find(content: Any, depth: int = 3) -> dict[str, Stored] | None:
    if not depth or not isinstance(content, dict):
        return None
    if content and all(isinstance(name, str) and isinstance(value, Stored) for name, value in content.items()):
        return content
    return next((found for k in _ENTRIES if (found := _find(content.get(k), depth - 1)) is not None), None)


def _tensors(value: Any) -> int:
    return sum(isinstance(v, Stored) for v in value.values()) if isinstance(value, dict) else 0


def _arrays(tensors: Mapping[str, Stored], read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    """The tensors as views of their storages, each of which is read once: no more memory than the file has bytes."""
    storages: dict[str, np.ndarray] = {}
    types: dict[str, str] = {}
    arrays = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        if storage.key not in storages:
            flat = np.frombuffer(read(storage), _DTYPES[storage.type])
            storages[storage.key] = widened(flat) if storage.type == "BFloat16Storage" else flat
        flat, empty = storages[storage.key], 0 in shape
        if types.setdefault(storage.key, storage.type) != storage.type:
            raise Refused(f"its storage {_brief(storage.key)} is of two types")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        # A stride of 0 would make terabytes of one number.
        if flat.size != storage.size or (not empty and (last >= flat.size or math.prod(shape) > flat.size)):
            raise Refused(f"{_brief(name)} of shape {_brief(shape)} does not lie within its {flat.size:,} numbers")
        if empty:
            arrays[name] = np.empty(shape, flat.dtype)
            continue
        steps = [stride * flat.itemsize for stride in strides]
        arrays[name] = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
    return arrays


# ---- the pickle ----


def _rebuild_tensor(*given: Any) -> Stored:
    storage, offset, shape, strides, *_ = given
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides) or len(shape) > 32:
        raise Refused("a tensor without as many strides as sizes, at most 32")
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, Storage) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise Refused("a tensor of something else than numbers")
    return Stored(storage, offset, shape, strides)


def _dict(content: Any = ()) -> dict[Any, Any]:
    pairs = content.items() if isinstance(content, dict) else content
    return OrderedDict((_key(key), value) for key, value in pairs)


def _key(value: Any) -> Any:
    if not isinstance(value, (str, int, float, Name, type(None))):  # to hash nested tuples may take for ever
        raise Refused(f"a table with a {type(value).__name__} as a key")
    return value


def _brief(value: Any) -> str:
    """A value in an error message; of what may be nested without end, the kind alone."""
    flat = isinstance(value, (str, int, Name)) or (type(value) is tuple and all(type(n) is int for n in value))
    return (repr(str(value)[:80]) if isinstance(value, str) else str(value)[:80]) if flat else type(value).__name__


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


_CALLED: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _dict,
    Name("collections", "Counter"): _dict,  # in the state of PyTorch's learning-rate schedules
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}
_MENTIONED = ("pytorch_lightning.", "lightning.")  # classes that name entries of a checkpoint, never called
_MARK = object()


class _Machine:
    """Interprets one pickle, from its start to its STOP, with a stack and a memo as pickle has them."""

    def __init__(self, pickle: bytes | BinaryIO, storage: Callable[[Any], Storage]):
        self.operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(pickle)
        self.storage = storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # what calls have taken over from the memo: few bytes may ask for many copies

    def run(self) -> Any:
        for operation, argument, _ in itertools.islice(self.operations, _LONGEST_PICKLE // 64):
            if operation.name == "STOP":
                return self.stack.pop()
            self.step(operation.name, argument)
        raise Refused("its pickle is far longer than that of any network here")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "MARK":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": (), "MARK": _MARK}[name])
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.since_mark()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.top(dict)[_key(key)] = value
            case "SETITEMS":
                pairs = self.since_mark()
                self.top(dict).update(zip(map(_key, pairs[::2]), pairs[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.named(module, attribute))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, Name) or function not in _CALLED:
                    raise Refused(f"its pickle calls {_brief(function)}, which is not needed for weights")
                self.copied += sum(len(given) for given in arguments if isinstance(given, (dict, list, tuple)))
                if self.copied > _LONGEST_PICKLE // 64:
                    raise Refused("its pickle makes more copies than any network here needs")
                stack.append(_CALLED[function](*arguments))
            case "BUILD":  # the attributes of a state dict: versions of its layers
                stack.pop()
                self.top(OrderedDict)
            case _:
                raise Refused(f"its pickle has the instruction {name}, which weights do not need")

    @staticmethod
    def named(module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("its pickle names something by what is no text")
        found = Name(module, name)
        storage = found.module in ("torch", "torch.storage") and found.name in _DTYPES
        if not storage and found not in _CALLED and not module.startswith(_MENTIONED):
            raise Refused(f"its pickle names {found}, which is not needed for weights")
        return found

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - next(i for i, value in enumerate(reversed(self.stack)) if value is _MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise Refused(f"its pickle fills a {kind.__name__} where there is none")
        return self.stack[-1]


# ---- writing ----


def write_pytorch(path: Path, arrays: Mapping[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write a state dict as `torch.load(path, weights_only=True)` reads it, and `about` beside it.

    An OrderedDict of tensors, each with a storage of its own. PyTorch leaves `about` aside.
    """
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<") not in _STORAGES:
            raise WeightsError(f"{path}: {name} is {array.dtype}, which PyTorch has no storage for")
    pickle = io.BytesIO()
    put = pickle.write
    put(b"\x80\x02ccollections\nOrderedDict\n)R(")
    for key, (name, array) in enumerate(arrays.items()):
        put(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage"))
        put(f"ctorch\n{_STORAGES[array.dtype.newbyteorder('<')]}\n".encode())
        put(_text(str(key)) + _text("cpu") + _number(array.size) + b"tQ" + _number(0))
        strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
        for numbers in (array.shape, strides):
            put(b"(" + b"".join(map(_number, numbers)) + b"t")
        put(b"\x89ccollections\nOrderedDict\n)RtR")  # no gradient wanted, no hooks
    put(b"u.")

    def write(file: BinaryIO) -> None:
        root = path.stem
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

            def member(name: str, content: bytes | memoryview) -> None:
                archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), content)  # its date is a constant

            member("data.pkl", pickle.getvalue())
            member("byteorder", b"little")
            for key, array in enumerate(arrays.values()):
                member(f"data/{key}", np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            member("version", b"3\n")
            member(_ABOUT, json.dumps(about).encode())

    replace_file(path, write)


def _text(text: str) -> bytes:
    content = text.encode()
    return b"X" + len(content).to_bytes(4, "little") + content


def _number(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + number.to_bytes(4, "little")
    return b"\x8a\x08" + number.to_bytes(8, "little")
