"""The lists of selectors and droppers; exports, commands, tables and tests derive from them."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from ..core.handover import register_beyond
from .base import Dropper, Named, Selector

_SELECTORS: dict[str, type[Selector]] = {}
_DROPPERS: dict[str, type[Dropper]] = {}
N = TypeVar("N", bound=type[Named])


def register_selector(cls: N) -> N:
    """Class decorator that adds a selector under its `name`.

    Raises:
        ValueError: the class has no name, or the name is taken.
    """
    register_beyond(cls, "chooses which rows of an image a language model sees")
    return _register(cls, _SELECTORS)


def register_dropper(cls: N) -> N:
    """Class decorator that adds a dropper under its `name`.

    Raises:
        ValueError: the class has no name, or the name is taken.
    """
    register_beyond(cls, "drops visual rows between the layers of a language model")
    return _register(cls, _DROPPERS)


def _register(cls: N, table: dict[str, Any]) -> N:
    if not cls.name:
        raise ValueError(f"{cls.__name__} cannot be registered without a name; set name = '...' in the class")
    taken = _SELECTORS.get(cls.name) or _DROPPERS.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    table[cls.name] = cls
    return cls


def list_selectors() -> list[str]:
    """Names of all selectors, sorted."""
    return sorted(_SELECTORS)


def list_droppers() -> list[str]:
    """Names of all droppers, sorted."""
    return sorted(_DROPPERS)


def find(name: str) -> type[Selector] | type[Dropper] | None:
    """The selector or dropper of a name, None where there is none."""
    return _SELECTORS.get(name) or _DROPPERS.get(name)


def create(name: str, **options: Any) -> Selector | Dropper:
    """Builds a selector or dropper from its name and options.

    Raises:
        ValueError: unknown name or option, or a value out of range.
    """
    cls = find(name)
    if cls is None:
        known = [*list_selectors(), *list_droppers()]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name!r} is no selector or dropper; {hint}Known: {', '.join(known)}")
    for key in options:
        if key not in cls.options():
            near = difflib.get_close_matches(key, cls.options(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{name} has no option {key!r}; {hint}Options: {', '.join(cls.options())}")
    return cls(**options)
