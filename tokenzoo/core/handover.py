"""Methods that act outside of a vision tower: what a tower alone says about them."""

from __future__ import annotations

from typing import Any

_BEYOND: dict[str, tuple[type, str]] = {}  # name -> (class, what it does)


def register_beyond(cls: type, what: str) -> None:
    """Notes a method that a tower alone cannot follow.

    Args:
        cls: a class with a `name`.
        what: what it does, "chooses which rows of an image a language model sees".
    """
    _BEYOND[cls.name] = (cls, what)


def refuse_beyond(method: Any) -> None:
    """Refuses a name, or an object, of a method that acts outside of a tower.

    Raises:
        ValueError: with what it does and where it works.
    """
    for name, (cls, what) in _BEYOND.items():
        if method == name or isinstance(method, cls):
            raise ValueError(
                f"{name} {what}, and this model hands its tokens to none; patch the vision-language model as a whole "
                "(see docs/vlm.md), or use a method of tokenzoo.list_methods()"
            )
