"""Shares or counts of the patches to keep where a class token stands in the middle of the scanned sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout
from .keep import Keep


@dataclass(frozen=True)
class Balanced(Keep):
    """As `Keep`; with a class token, a rate leaves an odd number of tokens, and counts have to be even.

    As released: as many patches then stand on both sides, and the class token takes one of the places a rate keeps.
    """

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain, explicit counts checked."""
        rate, count = step.strength
        patches, has_class = n - layout.num_prefix, layout.num_prefix > 0
        if count is not None:
            if count > patches:
                raise step.error(f"tokens={count} cannot be kept of {patches} patches; lower it or use keep_rate")
            if has_class and count % 2:
                raise step.error(
                    f"tokens={count} is odd, but as many patches have to stand on both sides of the class token; give "
                    f"{count - 1 or 2} or {count + 1}"
                )
            return count
        kept = self.rounding(rate, patches)
        return min(kept - 1 + (kept % 2 == 0), patches) if has_class else kept

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        kept = step.count(n, layout)
        if kept < 1:
            raise step.error(f"keep_rate={step.strength[0]} leaves none of {n - layout.num_prefix} patches; raise it")
        return layout.num_prefix + kept

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        if t == 0:
            return {"keep_rate": 1.0, "tokens": None}
        patches, step = layout.num_patches, 2 if layout.num_prefix else 1
        rate = 1 - t * (1 - (step / patches) ** (1 / max(1, len(layers))))
        counts = (patches * rate ** (i + 1) for i in range(len(layers)))
        most = patches // step * step
        return {"tokens": tuple(min(max(step, round(count / step) * step), most) for count in counts)}
