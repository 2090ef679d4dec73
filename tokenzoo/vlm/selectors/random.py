"""random: rows drawn by chance, the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class RandomRows(Selector):
    """Keeps rows drawn by chance: the same ones in every call, whatever else is in the batch.

    Args:
        seed: of the draw.

    Source: the baseline of all papers here.
    """

    seed: int = number(0, "give a whole number", least=0, whole=True)

    name = "random"
    source = "baseline"
    kind = "prune"

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        drawn = torch.randperm(rows.length, generator=torch.Generator().manual_seed(self.seed))[:keep]
        return chosen_rows(drawn.to(rows.x.device).expand(rows.x.shape[0], -1), rows.length)
