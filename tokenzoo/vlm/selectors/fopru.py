"""fopru: the rows, or lines of rows, that get the most attention."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import choice
from ...maps import KeepMap
from ..base import Selector
from ..functional import fopru
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class FoPru(Selector):
    """Keeps the rows, or whole lines of the grid, that get the most attention in the layer that is handed on.

    Attention is that of the class token, or the mean that a row gets where there is none. Without released code, which
    of the two the authors take is not known. Rows that form no grid are ranked one by one.

    Args:
        by: "rank": rows one by one; "row": lines of the grid by the sum of their rows, where the best rows of the next
            line fill what is left of the budget (ours).

    Source: Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", 2024.
    """

    by: str = choice("rank", ("rank", "row"))

    name = "fopru"
    source = "Jiang et al., 2024"
    kind = "prune"
    reads = ("tower",)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        width = None if self.by == "rank" or rows.grid is None else rows.grid[1]
        return chosen_rows(fopru(signals.importance(-2), keep, width), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads
