"""hiprune: anchors of a shallow layer, their neighbours, and the best rows of a deep one."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..functional import hiprune
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class HiPrune(Selector):
    """Keeps rows that get much attention in a middle layer, their neighbours, and those that get much in the last one.

    Scores are the mean attention that a row gets, over heads and queries. Neighbours above and below are taken where
    rows form a grid. There are round(keep * alpha / 5) anchors, at most keep // 5.

    Args:
        alpha: share of the budget for anchors and their neighbours.
        layer: the middle layer, counted from 1; None for the one at 9 / 24 of the depth, 9 in CLIP-L.

    Source: Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language
    Models", 2025.
    """

    alpha: float = number(0.1, "give a share such as 0.1", least=0, most=1)
    layer: int | None = number(None, "give a layer counted from 1, such as 9", least=1, whole=True, none=True)

    name = "hiprune"
    source = "Liu et al., 2025"
    kind = "prune"
    reads = ("tower",)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self._middle(depth), -2)

    def _middle(self, depth: int) -> int:
        if self.layer is not None and self.layer > depth:
            raise ValueError(f"hiprune: layer={self.layer}, but the tower has {depth}; give one from 1 to {depth}")
        return max(1, round(depth * 9 / 24)) - 1 if self.layer is None else self.layer - 1

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        shallow, deep = signals.received(self._middle(signals.depth)), signals.received(-2)
        width = None if rows.grid is None else rows.grid[1]
        return chosen_rows(hiprune(shallow, deep, keep, self.alpha, width), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return 2 * n * n * heads
