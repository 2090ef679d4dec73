"""fastervlm: the rows that the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from ...maps import KeepMap
from ..base import Selector
from ..picking import best_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Selector):
    """Keeps the rows that the class token attends to most in the layer that is handed on, mean over heads.

    Towers without a class token are ranked by the mean attention that a row gets there. Published with renumbered
    positions.

    Source: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", 2024.
    """

    name = "fastervlm"
    source = "Zhang et al., 2024"
    kind = "prune"
    reads = ("tower",)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        return best_rows(signals.importance(-2), keep)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads
