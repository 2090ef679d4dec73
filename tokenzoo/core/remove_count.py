"""Options of methods that merge r pairs of tokens in some blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .method import Method
from .schedule import Remove


@dataclass(frozen=True, kw_only=True)
class RemoveCount(Method):
    """Base of methods that remove a number of patches in each of their blocks, at most every second one.

    Args:
        r: patches to remove per block: an int, a list with one entry per block (missing ones 0), or (r, slope), see
            `tokenzoo.schedules.removed_per_layer`.
        clip: remove fewer where r exceeds half of the patches, instead of refusing.
        layers: blocks to act in.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 11
    clip: bool = False

    schedule = Remove()
