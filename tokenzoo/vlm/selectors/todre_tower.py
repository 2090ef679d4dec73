"""todre_tower: rows that are unlike those already chosen (the first stage of ToDRE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...maps import KeepMap
from ..base import Selector
from ..functional import todre
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class ToDRETower(Selector):
    """Keeps, from the row with the most attention on, rows with the smallest sum of cosines to those already chosen.

    The first stage of ToDRE. The pivot is a row of the thumbnail (of the first frame of a video), by the class token of
    the tower's last layer, or by the mean attention that a row gets there. From the paper, without released code.

    Source: Li et al., "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", 2025.
    """

    name = "todre_tower"
    source = "Li et al., 2025"
    kind = "prune"
    unit = "image"
    reads = ("tower",)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (-1,)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        score = signals.importance(-1)
        score = score if rows.part is None else torch.where(rows.part == 0, score, torch.full_like(score, -1))
        return chosen_rows(todre(rows.x, score, keep), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads + n * keep * dim
