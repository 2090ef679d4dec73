"""visiondrop_tower: visionzip with the shares of VisionDrop's first stage."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import number
from ..registry import register_selector
from .visionzip import VisionZip


@register_selector
@dataclass(frozen=True, kw_only=True)
class VisionDropTower(VisionZip):
    """Keeps the rows with the most attention and merges the others into a few: VisionDrop's stage behind the tower.

    It is VisionZip's step with other shares; later stages are a dropper.

    Args:
        contextual: share of the budget for contextual rows, 6 of 48 as published.

    Source: Xu et al., "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", AAAI 2026.
    """

    contextual: float = number(0.125, "give a share such as 0.125", least=0, most=1)

    name = "visiondrop_tower"
    source = "Xu et al., AAAI 2026"
