"""What a schedule is: how the options of a method become one strength per block, as declared data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout


@dataclass(frozen=True)
class Schedule:
    """How the options of a method become one strength per block, and how many tokens that leaves.

    The base declares nothing: a method with this one defines `strengths`, `tokens_out` and `dial` itself.

    Args:
        layers: blocks to act in by default, of a depth; all for None.
        layer_names: names that `layers` may be besides indices, for places outside of the blocks.
    """

    layers: Callable[[int], Sequence[int]] | None = None
    layer_names: tuple[str, ...] = ()

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks to act in when the user names none."""
        return tuple(range(depth) if self.layers is None else self.layers(depth))

    def parse(self, method: Any) -> dict[str, Any]:
        """Checks the options and gives them one form each.

        Raises:
            TypeError, ValueError: with the method, the option and the remedy.
        """
        return {}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, Any]:
        """Strength of every block that reduces."""
        raise NotImplementedError(f"{type(method).__name__} does not say how strong it is: define strengths(depth)")

    def count(self, n: int, step: Step, layout: Layout) -> Any:
        """What the strength comes to for n tokens, prefix included; unchecked."""
        return None

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens that are left of n, prefix included; raises `step.error` for strengths that cannot be reached."""
        raise NotImplementedError(f"{type(step.method).__name__} does not say what it leaves: define tokens_out(...)")

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        """Options at relative strength t in [0, 1]."""
        raise ValueError(f"{method.name} has no strength that flops=... could solve for; set its own options instead")

    def image_dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any] | None:
        """Options at relative strength t under which the images decide how many tokens stay; None for no such form."""
        return None
