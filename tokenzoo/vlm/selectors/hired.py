"""hired: a budget for every crop, by what the thumbnail shows in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..functional import hired
from ..picking import kept_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class HiRED(Selector):
    """Keeps the rows that the class token attends to most, with a budget per crop by its attention to the thumbnail.

    The thumbnail gets a share of the budget. Where the class token attends in the first layer says how the rest is
    spread over the crops: counted in stretches of the thumbnail, one per crop, as the released code does. Shares of
    crops are rounded down, so that a few rows fewer may stay. Images without crops are ranked whole. Of videos, the
    first frame counts as the thumbnail.

    Args:
        alpha: share of the thumbnail.

    Source: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models", AAAI 2025.
    """

    alpha: float = number(0.5, "give a share such as 0.5", least=0, most=1)

    name = "hired"
    source = "Arif et al., AAAI 2025"
    kind = "prune"
    unit = "image"
    reads = ("tower",)
    data_dependent = True

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, -2)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        each = zip(signals.importance(0), signals.importance(-2), rows.part)
        return kept_rows(torch.stack([hired(*image, keep, self.alpha) for image in each]))

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return 2 * n * heads
