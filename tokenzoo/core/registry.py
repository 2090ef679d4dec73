"""The list of methods; exports, command line choices, README table and test matrix derive from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from .describing import complete
from .method import Method

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator that adds a method to the zoo under its `name`, and completes its docstring, see `describing`.

    Raises:
        ValueError: the class has no name or the name is taken.
    """
    if not cls.name:
        raise ValueError(f"{cls.__name__} cannot be registered without a name; set name = '...' in the class")
    taken = _METHODS.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"method name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    complete(cls)
    _METHODS[cls.name] = cls
    return cls


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class registered under a name.

    Raises:
        ValueError: no method has this name.
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see tokenzoo.list_methods()"
        raise ValueError(f"method {name!r} is unknown; {hint} Known: {', '.join(list_methods())}")
    return _METHODS[name]


def declaring(*traits: str) -> list[str]:
    """Names of the methods whose class declares one of some traits; none is built, since options may be required.

    Args:
        traits: names such as "serves_scans" or "opens_span".
    """
    return [name for name in list_methods() if any(_declares(_METHODS[name], trait) for trait in traits)]


def _declares(cls: type[Method], name: str) -> bool:
    own = getattr(cls, name)
    if own is not getattr(Method, name):  # a class of version 0.1
        return own if isinstance(own, bool) else True
    if name == "serves_scans":
        return cls.traits.scans is not None
    return bool(getattr(cls.traits, name))  # a function of the options may say yes


def create_method(name: str, **options: Any) -> Method:
    """Builds a method from its name and options.

    Raises:
        ValueError: unknown method or option, or a value out of range.
    """
    cls = method_class(name)
    check_options(name, cls, options)
    return cls(**options)


def check_options(name: str, cls: type[Method], options: Iterable[str]) -> None:
    """Refuses names that are no option of a method.

    Raises:
        ValueError: with the nearest option.
    """
    known = cls.options()
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{name} has no option {key!r}; {hint}Options: {', '.join(known)}")
