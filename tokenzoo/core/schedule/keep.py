"""Shares or counts of the patches to keep at a few blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout
from .base import Schedule
from .per_layer import keep_count, spread


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks at one, two and three quarters of the depth (3, 6, 9 of 12)."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


@dataclass(frozen=True)
class Keep(Schedule):
    """A share of the patches to keep, or counts, at a few blocks: the options `keep_rate` and `tokens`.

    Where the method has no option `tokens`, rates alone say it.

    Args:
        rounding: patches that a rate keeps of n.
        lowest: patches that are left at least when `flops=` asks for as few as possible.
        share: share of the patches that has to stay, rounded down (half of them where tokens merge in pairs).
    """

    layers: Callable[[int], Sequence[int]] | None = quarters
    rounding: Callable[[float, int], int] = keep_count
    lowest: float = 0.5
    share: float = 0.0

    def parse(self, method: Any) -> dict[str, Any]:
        check_rates(method)
        tokens = getattr(method, "tokens", None)
        for count in tokens if isinstance(tokens, (tuple, list)) else (tokens,):
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{method.name}: tokens={count!r}; give the number of patches to keep, at least 1")
        return {}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, tuple[float, int | None]]:
        rates = spread(method.keep_rate, layers, f"{method.name}: keep_rate")
        counts = spread(getattr(method, "tokens", None), layers, f"{method.name}: tokens")
        both = {i: (rates[i], counts[i]) for i in layers}
        return {i: (rate, count) for i, (rate, count) in both.items() if count is not None or rate < 1}

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain."""
        rate, count = step.strength[:2]  # what follows is the method's own
        return self.rounding(rate, n - layout.num_prefix) if count is None else count

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        kept, patches = kept_patches(n, step, layout), n - layout.num_prefix
        if kept < patches - int(patches * (1 - self.share)):
            raise step.error(
                f"keep_rate={step.strength[0]} leaves {kept} of {patches} patches, but at most "
                f"{int(patches * (1 - self.share))} can go in one block; raise it"
            )
        return layout.num_prefix + kept

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        counts = {"tokens": None} if "tokens" in method.options() else {}
        lowest = max(self.share, self.lowest / layout.num_patches)
        return {"keep_rate": 1 - t * (1 - lowest), **counts}


def check_rates(method: Any) -> None:
    """Refuses an option `keep_rate` that is neither a share nor shares."""
    for rate in method.keep_rate if isinstance(method.keep_rate, (tuple, list)) else (method.keep_rate,):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"{method.name}: keep_rate={method.keep_rate!r}; give a number in (0, 1] or one per layer")
        if not 0 < rate <= 1:
            raise ValueError(f"{method.name}: keep_rate={rate} is outside (0, 1]; 0.7 keeps 70 % of the patches")


def kept_patches(n: int, step: Step, layout: Layout) -> int:
    """Patches that remain of n tokens, prefix included, under a schedule that keeps; checked."""
    kept, patches = step.count(n, layout), n - layout.num_prefix
    if kept > patches:
        raise step.error(f"tokens={kept} cannot be kept of {patches} patches; lower it or use keep_rate")
    return kept


def kept_of(step: Step, layout: Layout) -> Callable[[int], int]:
    """The rule of one block: patches that remain of n patches."""
    return lambda n: step.count(layout.num_prefix + n, layout)
