"""The pickles of CIFAR's "python version", read as data.

A pickle is a program for a machine with a stack and a memo. It may name any function of any module and call it, repeat
what it has made, or nest it until the interpreter crashes. `read_pickle` runs this program on a machine of its own,
which knows numbers, texts, lists, tuples, dicts and the few names that describe an array. It imports and calls nothing:
an array is returned as its description, from which `uint8_array` builds it.
"""

from __future__ import annotations

import io
import math
import pickletools
from typing import Any, NamedTuple

import numpy as np

_MOST = 1 << 19  # operations; the largest file, CIFAR-100's 50,000 training rows, has about 300,000
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {  # operations that push their argument, as pickletools reads it
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # Python 2's: bytes
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",  # since NumPy 2
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes in protocol 2
}


class Refused(Exception):
    """The pickle asks for what describes no batch; the message says for what."""


class _Name(NamedTuple):
    """A function or class that the pickle names."""

    kind: str  # one of _NAMES' values


class _Made:
    """What a call of numpy would have made: what it was to be made of, and the state it was given then."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]):
        self.kind, self.arguments = kind, arguments
        self.state: Any = None


def read_pickle(content: bytes) -> Any:
    """The value of a pickle of any protocol from 0 to 4, arrays as descriptions.

    Time and memory are in proportion to the content. Raises Refused, and whatever a damaged pickle makes Python raise.
    """
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, Any] = {}
    text_left = len(content)  # a pickle that encodes one text again and again would outgrow any memory

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    argument: Any
    for count, (operation, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
        if count >= _MOST:
            raise Refused("it has more operations than any batch")
        match operation.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case name if name in _ARGUMENTS:
                stack.append(argument)
            case name if name in _STRINGS:
                stack.append(argument.encode("latin1"))
            case name if name in _VALUES:
                stack.append(_VALUES[name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(since_mark())
            case "APPEND":
                item = stack.pop()
                _of(list, stack).append(item)
            case "APPENDS":
                items = since_mark()
                _of(list, stack).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_dict(since_mark()))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of(dict, stack).update(_dict([key, value]))
            case "SETITEMS":
                items = since_mark()
                _of(dict, stack).update(_dict(items))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_named(module, attribute))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                match function, arguments:
                    case _Name("encode"), (str(text), "latin1" | b"latin1"):
                        if (text_left := text_left - len(text)) < 0:
                            raise Refused("it repeats a text")
                        stack.append(text.encode("latin1"))
                    case _Name("array" | "dtype" as kind), tuple():
                        stack.append(_Made(kind, arguments))
                    case _:
                        raise Refused("it calls what makes no array")
            case "BUILD":
                state = stack.pop()
                _of(_Made, stack).state = state
            case name:
                raise Refused(f"its operation {name} is not needed for a batch")
    raise Refused("it has no end")


def _of(kind: type, stack: list[Any]) -> Any:
    """The top of the stack, which must be of that kind."""
    if type(stack[-1]) is not kind:
        raise Refused(f"it changes a {type(stack[-1]).__name__} as if it were another thing")
    return stack[-1]


def _dict(items: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn. Keys are texts or numbers: hashing a nested tuple can take for ever, or crash."""
    if len(items) % 2 or not all(type(key) in (bytes, str, int) for key in items[::2]):
        raise Refused("a table has something else than a text as a key")
    return dict(zip(items[::2], items[1::2], strict=True))


def _named(module: Any, name: Any) -> _Name:
    if not (isinstance(module, str) and isinstance(name, str) and (module, name) in _NAMES):
        raise Refused(f"it asks for {str(module)[:60]}.{str(name)[:60]}")
    return _Name(_NAMES[module, name])


def uint8_array(described: Any) -> np.ndarray | None:
    """The array that `read_pickle` has described; None if it is not one of uint8 with as many bytes as it needs.

    numpy.ndarray pickles the state (version, shape, dtype, is Fortran, bytes).
    """
    match getattr(described, "state", None):
        case (_, tuple(shape), _Made(kind="dtype", arguments=("u1" | b"u1", *_)), bool(fortran), bytes(content)):
            # math.prod of hostile sizes is a large int, never an allocation
            sizes = len(shape) <= 4 and all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
            if sizes and math.prod(shape) == len(content):
                return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    return None
