"""Options of methods that keep a share or a count of the patches at a few blocks."""

from __future__ import annotations

from dataclasses import dataclass

from .method import Method
from .schedule import Keep


@dataclass(frozen=True, kw_only=True)
class KeepRate(Method):
    """Base of methods with a keep rate or explicit counts at chosen blocks.

    Args:
        keep_rate: share of the patches to keep at each block, in (0, 1]; one value or one per layer.
        tokens: patches to keep instead, an int or one entry per layer (None uses the rate there).
        layers: blocks to act in; by default at one, two and three quarters of the depth.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    tokens: int | tuple[int | None, ...] | None = None

    schedule = Keep()
