"""Options as fields of a dataclass, each declared once: its range, its help, how the command line spells it.

The parser, the check of values, what a checkpoint stores and the printed command all follow from the declaration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

from minigrad.errors import MinigradError, no_such

_MOST = 1e15  # of a number that has no other limit
_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}


def option(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    least: float = 0,
    most: float = _MOST,
    choices: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    """A field with what is known of its values.

    kind          of values, if the default does not tell: it is None then, which stays allowed
    least, most   for numbers
    more          what the owner of the dataclass wants to know: see `training.options.Run`
    """
    known = {"help": help, "kind": kind or type(default), "least": least, "most": most, "choices": choices}
    return field(default=default, metadata=known | more)


def check(record: Any) -> None:
    """Raise MinigradError naming the option of a dataclass that is of another kind, not finite or out of range."""
    for option in options_of(record):
        value, rule = getattr(record, option.name), option.metadata
        if value is None and option.default is None:
            continue
        kind = rule["kind"]
        many = kind is tuple
        values = value if many and isinstance(value, tuple) else (value,)
        if many != isinstance(value, tuple) or not all(_is_a(x, float if many else kind) for x in values):
            raise MinigradError(f"{option.name} must be {_WORDS.get(kind, 'a tuple of numbers')}, got {value!r}")
        if rule["choices"] and value not in rule["choices"]:
            raise MinigradError(no_such(option.name, value, rule["choices"]))
        for x in values:
            if isinstance(x, (int, float)) and not rule["least"] <= x <= rule["most"]:  # NaN fails too
                bounded = rule["most"] < _MOST or x > _MOST
                limits = f"from {rule['least']:g} to {rule['most']:g}" if bounded else f"at least {rule['least']:g}"
                raise MinigradError(f"{option.name} must be {limits}, got {x!r}")


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, Path) if kind is Path else type(value) in ((int, float) if kind is float else (kind,))


def options_of(record: Any) -> Iterator[Field[Any]]:
    """The fields that `option` has made."""
    return (found for found in fields(record) if "kind" in found.metadata)


def flag(option: Field[Any]) -> str:
    """How the command line calls it."""
    return "--" + option.metadata.get("flag", option.name.replace("_", "-"))


def words(option: Field[Any], value: Any) -> list[str]:
    """The words of a command that give an option this value."""
    if option.metadata["kind"] is bool:
        return [flag(option) if value else f"--no-{flag(option)[2:]}"]
    return [flag(option), *map(str, value if isinstance(value, tuple) else (value,))]
