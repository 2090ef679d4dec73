"""visionzip: rows with much attention, and some that take in the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ..base import Selector
from ..functional import visionzip
from ..registry import register_selector
from ..rows import NewRows, VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class VisionZip(Selector):
    """Keeps the rows with the most attention and the class token, and merges the others into a few contextual rows.

    Contextual rows are targets at equal distances among the others; every one left is added to the target with the most
    alike key, as a mean (which about doubles the norm, as published). Rows are mixed in front of the projector. Where
    that takes several patches per row, or the tower has no class token, one row of attention more takes its place, and
    scores are the mean attention that a row gets.

    Args:
        contextual: share of the budget for contextual rows: 10 of 64, 20 of 128 and 30 of 192 as published.

    Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025.
    """

    contextual: float = number(0.15625, "give a share such as 0.16", least=0, most=1)

    name = "visionzip"
    source = "Yang et al., CVPR 2025"
    kind = "merge"
    reads = ("tower",)
    in_tower_space = True
    takes_class = True

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> NewRows:
        values, token = rows.values, rows.class_token
        if not rows.inside or token is None or token.shape[-1] != values.shape[-1]:
            token = values[:, :0]
        contextual = min(round(keep * self.contextual), keep - token.shape[1])
        plan = visionzip(
            signals.importance(-2), signals.mean_keys(-2), keep - token.shape[1] - contextual, contextual
        )
        dominant = values.gather(1, plan.dominant.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
        new = torch.cat([token.to(values.dtype), dominant, plan.contextual(values)], dim=1)
        # a class token takes the place of the first row that goes
        slots = torch.cat([plan.sources.amin(1, keepdim=True)[:, : token.shape[1]], plan.dominant, plan.targets], dim=1)
        assign = torch.full(values.shape[:2], -1, device=slots.device)
        at = torch.arange(keep, device=slots.device).expand_as(slots)
        first = keep - contextual
        assign = assign.scatter(1, slots[:, token.shape[1] :], at[:, token.shape[1] :])
        if contextual:
            assign = assign.scatter(1, plan.sources, plan.slot + first)
        return NewRows(new, slots, assign, rows.inside)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        targets = round(keep * self.contextual)
        return n * heads + (n - keep) * targets * heads
