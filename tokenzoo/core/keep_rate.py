"""Options of methods that keep a share or a count of the patches at a few blocks."""

from __future__ import annotations

from dataclasses import dataclass

from .method import Method
from .schedule import Keep


@dataclass(frozen=True, kw_only=True)
class KeepRate(Method):
    """Base of methods with a keep rate or explicit counts at chosen blocks; options: see `describing`."""

    keep_rate: float | tuple[float, ...] = 0.7
    tokens: int | tuple[int | None, ...] | None = None

    schedule = Keep()
