"""Options of methods that merge r pairs of tokens in some blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .method import Method
from .schedule import Remove


@dataclass(frozen=True, kw_only=True)
class RemoveCount(Method):
    """Base of methods that remove patches in each block, at most every second one; options: see `describing`."""

    r: int | tuple[Any, ...] | dict[str, Any] = 11
    clip: bool = False

    schedule = Remove()
