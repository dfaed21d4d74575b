"""The errors minigrad raises on purpose. Each message is one sentence: what was wrong, where, what to do."""

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any


class MinigradError(Exception):
    """Base of all errors below. Modules that it passes through prefix the path of the layer that raised it."""

    layer_path: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return printable(f"{self.layer_path}: {message}" if self.layer_path else message)


class ShapeError(MinigradError, ValueError):
    """Shapes do not fit together, or a size is out of range."""


class DtypeError(MinigradError, TypeError):
    """A dtype is not supported, or two operands differ in dtype."""


class GraphError(MinigradError, RuntimeError):
    """Backward cannot run: no graph, a graph already used, a value changed since, or a backward that returned the wrong
    thing."""


class BackendError(MinigradError, RuntimeError):
    """A backend cannot be used, or arrays of two backends meet in one operation."""


class StateError(MinigradError, ValueError):
    """A state dict does not fit the module it is loaded into."""


class GradientMismatch(MinigradError, AssertionError):
    """gradcheck found a gradient that finite differences do not confirm."""


class NonFiniteError(MinigradError, ArithmeticError):
    """A value or a gradient is NaN or Inf: see `minigrad.watch`."""

    def __init__(self, message: str, layer_path: str):
        super().__init__(message)
        self.layer_path = layer_path
        self.raised_in = None  # the path is the watched model's: modules that it passes through look up no other


# ---- What several messages say in the same way ----


def printable(text: str) -> str:
    """The text with control characters, line breaks and marks of writing direction escaped, as in Python's literals:
    names from files and networks must not steer a terminal, nor start a line of their own.

    Escapes the Unicode categories Cc, Cf, Cs, Co, Cn, Zl and Zp. Letters of any language and spaces stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text)


def did_you_mean(name: Any, choices: Iterable[str]) -> str:
    """Ask whether it was meant: of a name that is nearly one of the choices, else nothing."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.7)
    return f" — did you mean {by_lower[near[0]]!r}?" if near else ""


def no_such(kind: str, name: Any, choices: Iterable[str]) -> str:
    """A name that is none of the choices: what it was, what it may have been meant to be, and what there is."""
    choices = list(choices)
    near = did_you_mean(name, choices)
    return f"there is no {kind} {name!r}{near + ' Choose' if near else ': choose'} from {', '.join(choices)}"


def differences(kinds: Mapping[str, list[str]]) -> str:
    """As "missing (3): a, b, c; unexpected (1): d": of each kind how many, and the first eight."""
    return "; ".join(
        f"{kind} ({len(names)}): {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for kind, names in kinds.items()
        if names
    )
