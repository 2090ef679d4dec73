"""Counts that the images decide, unless an option fixes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout
from .base import Schedule
from .per_layer import spread


def open_counts(value: int | tuple[int | None, ...] | None) -> bool:
    """Whether an option that may fix counts leaves some to the images."""
    return value is None or (isinstance(value, (tuple, list)) and None in value)


@dataclass(frozen=True)
class Budget(Schedule):
    """A number of tokens that no image may exceed, class token included: the option `max_tokens`, None for none."""

    def parse(self, method: Any) -> dict[str, Any]:
        for count in method.max_tokens if isinstance(method.max_tokens, (tuple, list)) else (method.max_tokens,):
            if count is not None and (type(count) is not int or count < 3):
                raise ValueError(
                    f"{method.name}: max_tokens={count!r}; give None or at least 3 (class token and two patches)"
                )
        return {}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, int | None]:
        return spread(method.max_tokens, layers, f"{method.name}: max_tokens")

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that an image may keep."""
        return layout.num_patches if step.strength is None else min(step.strength - 1, layout.num_patches)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return layout.num_prefix + min(n - layout.num_prefix, step.count(n, layout))

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        # an equal share goes in every block: one count for all would take everything in the first of them
        rate = 1 - t * (1 - (2 / layout.num_patches) ** (1 / max(1, len(layers))))
        counts = (layout.num_patches * rate ** (i + 1) for i in range(len(layers)))
        return {"max_tokens": tuple(max(3, 1 + round(count)) for count in counts)}

    def image_dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        # as many as patches, as published, in the middle; more of them pick more tokens
        return {"max_tokens": None, "heights": max(2, round(8 * (1 - t) ** 3 * layout.num_patches))}
