"""uniform: every so many rows, the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from ...maps import KeepMap
from ..base import Selector
from ..picking import chosen_rows, even_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class UniformRows(Selector):
    """Keeps rows at equal distances in the order in which they stand, the middle one of each stretch.

    Source: the baseline of all papers here.
    """

    name = "uniform"
    source = "baseline"
    kind = "prune"

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        return chosen_rows(even_rows(rows.length, keep, rows.x.shape[0], rows.x.device), rows.length)
