"""Patches that hold a share of the attention mass: as many as each image asks for, within a budget or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout
from .keep import Keep


@dataclass(frozen=True)
class KeepMass(Keep):
    """What `Keep` says, or with the option `mass` as many patches as hold that share of the scores of an image.

    Then `tokens` is a budget: no image keeps more, and shapes are static.
    """

    def parse(self, method: Any) -> dict[str, Any]:
        if method.mass is not None and method.keep_rate != method.options()["keep_rate"]:
            raise ValueError(
                f"{method.name}: mass={method.mass} and keep_rate={method.keep_rate} both say what to keep; leave one "
                "out, or give the largest number of patches as tokens=..."
            )
        return super().parse(method)

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, tuple[float, int | None]]:
        if method.mass is None:
            return super().strengths(method, layers)
        if method.mass == 1 and method.tokens is None:
            return {}
        counts = super().strengths(method, layers)
        return {i: (1.0, counts[i][1]) for i in layers}

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain, with `mass` the most that may."""
        if step.method.mass is None:
            return super().count(n, step, layout)
        patches, most = n - layout.num_prefix, step.strength[1]
        return patches if most is None else min(patches, most)

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        if method.mass is None:
            return super().dial(method, t, layers, layout)
        return {"tokens": max(1, round((1 - t) * layout.num_patches))}  # what a budget can be held to

    def image_dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        # the share of the scores that is held, in every block
        return {"mass": 1 - 0.99 * t, "keep_rate": method.options()["keep_rate"], "tokens": None}
