"""Hooks that few methods need, each in a mixin of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..maps import TokenMap
from .step import Step
from .tokens import Tokens, TraceStep


def scanned_rows(tokens: Tokens) -> tuple[int, ...] | Tensor:
    """Where the prefix tokens are in the scanned sequence."""
    return tokens.layout.scan_rows if tokens.rows is None else tokens.rows


class Scanning:
    """Mixin of methods that say where prefix tokens go in the sequence that is scanned."""

    def scan_rows(self, tokens: Tokens, token_map: TokenMap, step: Step) -> tuple[int, ...] | Tensor | None:
        """Where the prefix tokens go in the scanned sequence, None to stay between their neighbours.

        Args:
            tokens: the tokens before the map; `tokens.rows` is where they are.
            token_map: the map.
            step: this method in this block.
        """
        return None


class Restoring:
    """Mixin of methods that have options for the way back to the full grid."""

    def lift_trace(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        """The trace as the way back to the full grid should read it."""
        return trace


class Companion:
    """Mixin of methods that work with some other methods of their recipe, and not with others."""

    def check_recipe(self, methods: tuple[Any, ...], depth: int) -> None:
        """Refuses recipes that the method cannot be part of.

        Args:
            methods: all methods of the recipe in order, this one included.
            depth: blocks of the model.
        """


HOOKS = {Scanning: "scan_rows", Restoring: "lift_trace", Companion: "check_recipe"}
