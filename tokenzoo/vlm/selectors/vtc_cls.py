"""vtc_cls: the rows that the class token attends to over several layers."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..picking import best_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class VTCCLS(Selector):
    """Keeps the rows that the class token attends to most, summed over the layers from one on to the one handed on.

    Towers without a class token are ranked by the mean attention that a row gets there.

    Args:
        start: first of the layers; negative numbers count from the end, -2 being the one handed on; the default is
            ours.

    Source: Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", 2024.
    """

    start: int = number(-6, "give the index of a layer such as 16, or -6 from the end", whole=True)

    name = "vtc_cls"
    source = "Wang et al., 2024"
    kind = "prune"
    reads = ("tower",)

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(max(self.start, -depth), -1) if self.start < 0 else range(self.start, depth))

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        last = signals.handed_on
        first = max(0, last + 2 + self.start) if self.start < 0 else self.start
        if first > last:
            raise ValueError(f"vtc_cls: start={self.start} lies behind layer {last}, which is handed on; give less")
        return best_rows(sum(signals.importance(layer) for layer in range(first, last + 1)), keep)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads * (abs(self.start) if self.start < 0 else 1)
