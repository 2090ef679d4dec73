"""Options of a method that check themselves: a field says what it takes, messages and checks follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

Check = Callable[[str, str, Any], Any]  # (method's name, option, value) -> the value to keep


def option(default: Any, check: Check) -> Any:
    """A field of a method's dataclass whose value is checked, and put into one form, when a method is made.

    Args:
        default: default value.
        check: see below for the usual ones.
    """
    return dataclasses.field(default=default, metadata={"check": check})


def choice(default: Any, values: Sequence[Any]) -> Any:
    """One of some values."""

    def check(name: str, field: str, value: Any) -> Any:
        if not any(value is known or (type(value) is type(known) and value == known) for known in values):
            raise ValueError(f"{name}: {field}={value!r}; use one of {', '.join(map(repr, values))}")
        return value

    return option(default, check)


def number(
    default: Any, hint: str, least: float | None = None, above: float | None = None, most: float | None = None,
    below: float | None = None, whole: bool = False, none: bool = False,
) -> Any:  # fmt: skip
    """A number within bounds.

    Args:
        default: default value.
        hint: what to give instead, for the message.
        least: smallest value.
        above: value that it has to exceed.
        most: largest value.
        below: value that it has to stay under.
        whole: integers only.
        none: None is allowed.
    """

    def check(name: str, field: str, value: Any) -> Any:
        if value is None and none:
            return value
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise TypeError(f"{name}: {field}={value!r}; {hint}")
        low = (least is not None and value < least) or (above is not None and not value > above)
        if low or (most is not None and value > most) or (below is not None and not value < below):
            raise ValueError(f"{name}: {field}={value}{_range(least, above, most, below)}; {hint}")
        return value

    return option(default, check)


def numbers(hint: str, below: float | None = None) -> Check:
    """A number, or one per layer.

    Args:
        hint: what to give instead, for the message.
        below: value that each has to stay under.
    """

    def check(name: str, field: str, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, bool) or not isinstance(each, (int, float)):
                raise TypeError(f"{name}: {field}={value!r}; give {hint}, or one per layer")
            if each != each or (below is not None and each >= below):
                raise ValueError(f"{name}: {field}={value!r}; give {hint}, or one per layer")
        return value

    return check


def _range(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    if (most, below) == (None, None):
        return " is negative" if least == 0 else " has to be positive" if above == 0 else f" is below {least or above}"
    low = "(-inf" if (least, above) == (None, None) else f"({above}" if least is None else f"[{least}"
    return f" is outside {low}, {f'{most}]' if below is None else f'{below})'}"


def pair(
    default: Any, hint: str, least: int = 1, area: int = 1, none: bool = False, both: bool = False, fault: str = ""
) -> Any:
    """One whole number for both directions, or two (down, right).

    Args:
        default: default value.
        hint: what to give instead, for the message.
        least: smallest side.
        area: smallest product of both.
        none: None is allowed.
        both: two numbers are kept, else equal ones as one.
        fault: what is wrong with smaller ones, for a message that names the value as it was given.
    """

    def check(name: str, field: str, value: Any) -> Any:
        if value is None and none:
            return value
        or_none = ", or None" if none else ""
        sides = (value, value) if type(value) is int else value
        if not isinstance(sides, (tuple, list)) or len(sides) != 2 or any(type(side) is not int for side in sides):
            raise TypeError(
                f"{name}: {field}={value!r}; give two whole numbers (down, right), or one for both{or_none}"
            )
        if min(sides) < least or sides[0] * sides[1] < area:
            raise ValueError(f"{name}: {field}={f'{value!r} {fault}' if fault else tuple(sides)}; {hint}")
        return sides[0] if sides[0] == sides[1] and not both else tuple(sides)

    return option(default, check)


def sides(value: int | tuple[int, int]) -> tuple[int, int]:
    """(down, right) of what `pair` keeps."""
    return (value, value) if isinstance(value, int) else value


def check_fields(method: Any) -> None:
    """Checks every option of a method, in the order in which they are declared; lists become tuples.

    Raises:
        TypeError, ValueError: with the method, the option and the remedy.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.type in ("bool", bool) and not isinstance(value, bool):
            raise TypeError(f"{method.name}: {field.name}={value!r}; give True or False")
        value = tuple(value) if isinstance(value, list) else value
        if "check" in field.metadata:
            value = field.metadata["check"](method.name, field.name, value)
        object.__setattr__(method, field.name, value)


def odd(name: str, field: str, value: Any) -> int:
    """An odd whole number from 1 on."""
    if type(value) is not int or value < 1 or value % 2 == 0:
        raise ValueError(f"{name}: {field}={value!r}; give an odd number of cells, such as 5")
    return value


def centres(name: str, field: str, value: Any) -> int:
    """How many centres a token mixes."""
    if type(value) is not int or (value < 1 and value != -1):
        raise ValueError(f"{name}: {field}={value!r}; give a number of centres, or -1 for all")
    return value


def three(name: str, field: str, value: Any) -> tuple[float, float, float]:
    """One number per colour."""
    value = tuple(value)
    if len(value) != 3 or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise ValueError(f"{name}: {field}={value!r}; give three numbers")
    return value
