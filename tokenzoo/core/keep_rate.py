"""What methods share that keep a share or a count of the patches at a few blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .method import Method, Step
from .schedule import keep_count, spread
from .tokens import Layout


@dataclass(frozen=True, kw_only=True)
class KeepRate(Method):
    """Base of methods with a keep rate or explicit counts at chosen blocks.

    Args:
        keep_rate: share of the patches to keep at each block, in (0, 1]; one value or one a layer.
        tokens: patches to keep instead, an int or one entry a layer (None uses the rate there).
        layers: blocks to act in; by default at one, two and three quarters of the depth.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    tokens: int | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("keep_rate", "tokens"):
            value = getattr(self, field)
            object.__setattr__(self, field, tuple(value) if isinstance(value, list) else value)
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,)
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, (int, float)):
                raise TypeError(f"{self.name}: keep_rate={self.keep_rate!r}; give a number in (0, 1] or one a layer")
            if not 0 < rate <= 1:
                raise ValueError(f"{self.name}: keep_rate={rate} is outside (0, 1]; 0.7 keeps 70 % of the patches")
        counts = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        for count in counts:
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{self.name}: tokens={count!r}; give the number of patches to keep, at least 1")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))

    def strengths(self, depth: int) -> dict[int, Any]:
        layers = self.resolve_layers(depth)
        rates = spread(self.keep_rate, layers, f"{self.name}: keep_rate")
        counts = spread(self.tokens, layers, f"{self.name}: tokens")
        both = {i: (rates[i], counts[i]) for i in layers}
        return {i: (rate, count) for i, (rate, count) in both.items() if count is not None or rate < 1}

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain."""
        rate, count = step.strength
        return keep_count(rate, n - layout.num_prefix) if count is None else count

    def kept(self, step: Step, layout: Layout) -> Callable[[int], int]:
        """The rule of one block: patches that remain of n."""
        return lambda n: step.count(layout.num_prefix + n, layout)

    def kept_patches(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain of n tokens, checked."""
        kept, patches = step.count(n, layout), n - layout.num_prefix
        if kept > patches:
            raise step.error(f"tokens={kept} cannot be kept of {patches} patches; lower it or use keep_rate")
        return kept

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return layout.num_prefix + self.kept_patches(n, step, layout)

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        lowest = 0.5 / layout.num_patches
        return replace(self, keep_rate=1 - t * (1 - lowest), tokens=None)
