"""Every public name explains itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import minigrad
from minigrad import ops

ROOMS = [
    *(f"minigrad{room}" for room in ("", ".ops", ".nn", ".nn.init", ".tensor", ".layout", ".optim", ".schedule")),
    *(f"minigrad.{room}" for room in ("random", "watch", "gradcheck", "summary", "backend", "threads", "errors")),
    *(f"inception.{room}" for room in ("models", "data", "training", "weights")),
]


def public(room: str) -> Iterator[tuple[str, Any]]:
    """The names a room offers: its __all__, or what it defines itself."""
    module = importlib.import_module(room)
    own = [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", None) == room]
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            yield name, value


def unexplained(name: str, value: Any) -> Iterator[str]:
    """The name, and those of its own methods and properties, that lack a docstring (an inherited one counts)."""
    doc = inspect.getdoc(value) or ""
    if not doc or doc.startswith(f"{name}("):  # what NamedTuple and dataclass put where there is none
        yield name
    for member, raw in vars(value).items() if inspect.isclass(value) else ():
        kinds = (property, classmethod, staticmethod)
        method = inspect.isfunction(raw) or isinstance(raw, kinds)
        if member[0] != "_" and method and not inspect.getdoc(getattr(value, member)):
            yield f"{name}.{member}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_has_a_docstring(room: str) -> None:
    names = list(public(room))
    assert names
    assert [lacking for name, value in names for lacking in unexplained(name, value)] == []


@pytest.mark.parametrize("name", [name for name, value in public("minigrad.ops") if inspect.isfunction(value)])
def test_every_op_says_what_it_keeps_for_backward(name: str) -> None:
    assert "saves" in inspect.getdoc(getattr(ops, name)).lower()


def test_help_of_minigrad_is_a_table_of_contents() -> None:
    assert [name for name in minigrad.__all__ if f"    {name} " not in minigrad.__doc__] == []


def test_a_missing_docstring_would_be_found() -> None:
    class Silent:
        def method(self) -> None: ...

    assert list(unexplained("Silent", Silent)) == ["Silent", "Silent.method"]
