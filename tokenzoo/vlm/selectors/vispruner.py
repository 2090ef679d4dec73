"""vispruner: what the class token attends to, and what differs among the rest."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..functional import vispruner
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class VisPruner(Selector):
    """Keeps the rows with the most attention, and of the others those that are left when alike ones go.

    Attention is that of the class token in the layer that is handed on (the mean that a row gets where there is none).
    The others stand in two halves, every second row each; eight at a time, those of the first half go that are most
    alike to a row of the second.

    Args:
        important: share of the budget that is taken by attention.

    Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
    ICCV 2025.
    """

    important: float = number(0.5, "give a share such as 0.5", least=0, most=1)

    name = "vispruner"
    source = "Zhang et al., ICCV 2025"
    kind = "prune"
    reads = ("tower", "features")

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        return chosen_rows(vispruner(signals.importance(-2), rows.features, keep, self.important), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads + n * n * dim
