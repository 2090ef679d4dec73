"""divprune: rows that are far from each other."""

from __future__ import annotations

from dataclasses import dataclass

from ...maps import KeepMap
from ..base import Selector
from ..functional import divprune
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class DivPrune(Selector):
    """Keeps rows whose smallest distance to each other is large, greedily, on the rows that the language model sees.

    Distances are 1 - cosine; the first row is the one farthest from its nearest other. Reads neither the tower nor the
    prompt, so that it works with every model.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025.
    """

    name = "divprune"
    source = "Alvar et al., CVPR 2025"
    kind = "prune"
    unit = "image"

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        return chosen_rows(divprune(rows.x, keep), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * (n + keep) * dim
