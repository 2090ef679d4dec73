"""Shares of all patches of the image, rounded down, as methods that train predictors and slots count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..step import Step
from ..tokens import Layout
from .keep import Keep


class Kept(NamedTuple):
    """What one block keeps; shares are of all patches of the image, whole numbers count patches.

    Attributes:
        rate: share of the patches that the block before left.
        tokens: patches to keep instead, None for the rate.
        after: share or count behind the block.
        before: share or count in front of it.
    """

    rate: float
    tokens: int | None
    after: float | int
    before: float | int

    def share(self, patches: int) -> float:
        """Share of all patches of the image that is left behind the block."""
        return self.after if isinstance(self.after, float) else self.after / patches


def part_of(share: float | int, patches: int) -> int:
    """Patches that a share of all of them comes to, rounded down, one at least; a count is one already."""
    return share if isinstance(share, int) else max(1, int(patches * share))


@dataclass(frozen=True)
class KeepOfAll(Keep):
    """As `Keep`, but rates multiply up and are rounded once: int(r^i * n) of the image's n patches at the i-th block.

    Where another method, or padding, has left other patches than that, the rate is one of those that are there.
    """

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, Kept]:
        found: dict[int, Kept] = {}
        before: float | int = 1.0
        for layer, (rate, count) in sorted(super().strengths(method, layers).items()):
            after = count if count is not None else part_of(rate, before) if isinstance(before, int) else before * rate
            found[layer] = Kept(rate, count, after, before)
            before = after
        return found

    def count(self, n: int, step: Step, layout: Layout) -> int:
        kept, patches = step.strength, n - layout.num_prefix
        if kept.tokens is not None:
            return kept.tokens
        if patches == part_of(kept.before, layout.num_patches):
            return part_of(kept.after, layout.num_patches)
        return part_of(float(kept.rate), patches)


@dataclass(frozen=True)
class Slots(KeepOfAll):
    """The same where a module has a row per token that it makes: as many as at the model's own image size, always."""

    def count(self, n: int, step: Step, layout: Layout) -> int:
        return super().count(n, step, layout) if step.known is None else step.known.count

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        # an image with fewer patches than slots still fills all of them
        return super().tokens_out(n, step, layout) if step.known is None else layout.num_prefix + step.known.count
