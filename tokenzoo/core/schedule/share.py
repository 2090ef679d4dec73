"""A share of the tokens that merges into destinations, one per cell of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..options import sides
from ..step import Step
from ..tokens import Layout
from .base import Schedule


@dataclass(frozen=True)
class Share(Schedule):
    """A share of the patches to merge: options `ratio`, `stride` (size of a cell) and `clip`.

    With stride=None, even tokens merge into odd ones, and the share is one of all tokens.
    """

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, float]:
        return dict.fromkeys(layers, method.ratio) if method.ratio > 0 else {}

    def sources(self, method: Any, patches: int, layout: Layout) -> int:
        """Patches that can merge."""
        if method.stride is None:
            return patches // 2
        down, right = sides(method.stride)
        if patches == layout.num_patches:
            return patches - (layout.grid[0] // down) * (layout.grid[1] // right)
        return patches - -(-patches // (down * right))  # they form no grid: stretches

    def wanted(self, method: Any, patches: int, layout: Layout) -> int:
        """Patches that the ratio asks to merge."""
        return int((patches + (layout.num_prefix if method.stride is None else 0)) * method.ratio)

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that the ratio asks to merge."""
        return self.wanted(step.method, n - layout.num_prefix, layout)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        method, patches, wanted = step.method, n - layout.num_prefix, step.count(n, layout)
        most = self.sources(method, patches, layout)
        if method.stride is not None and patches == layout.num_patches and most == patches:
            raise step.error(f"stride={method.stride} is larger than the {layout.grid[0]} x {layout.grid[1]} patches")
        return n - self.possible(wanted, most, n, step)

    def possible(self, wanted: int, most: int, n: int, step: Step) -> int:
        """Tokens to merge where at most some of n can; refuses to merge fewer than wanted without `clip`."""
        if wanted > most and not step.method.clip:
            raise step.error(
                f"ratio={step.method.ratio} asks to merge {wanted} tokens, but at most {most} of {n} can; lower it, or "
                "set clip=True to merge what is possible"
            )
        return min(wanted, most)

    def left(self, patches: int, step: Step, layout: Layout) -> int:
        """Patches that are left of some, as far as these can merge; unchecked."""
        wanted = step.count(layout.num_prefix + patches, layout)
        return patches - min(wanted, self.sources(step.method, patches, layout))

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        counted = layout.num_patches + (layout.num_prefix if method.stride is None else 0)
        return {"ratio": t * self.sources(method, layout.num_patches, layout) / counted}
