"""fastv: once, by what the last word attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...core.options import number
from ..base import Dropper
from ..layer_signals import LayerRows, LayerSignals
from ..registry import register_dropper


@register_dropper
@dataclass(frozen=True, kw_only=True)
class FastV(Dropper):
    """Drops once the visual rows that the last row of the prompt attends to least, mean over heads.

    Attention is that of the layer in front of the cut. Published with original positions.

    Args:
        removed: share of the visual rows to drop.
        layers: the one layer that rows are dropped in front of; 2 by default.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    """

    removed: float = number(0.5, "give the share of visual rows to drop", least=0, most=1)

    name = "fastv"
    source = "Chen et al., ECCV 2024"
    kind = "prune"
    scored_by = "previous"
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 1:
            raise ValueError(f"fastv: layers={self.layers}; it drops once, give one layer")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (2,)

    def count(self, n: int, stage: int) -> int:
        return round(n * (1 - self.removed))

    def score(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Tensor:
        return signals.attention()

    def dial(self, t: float) -> FastV:
        return replace(self, removed=t)
