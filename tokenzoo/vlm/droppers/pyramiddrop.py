"""pyramiddrop: in stages, by what the last word of a question would attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ...core.options import option
from ..base import Dropper, shares_of
from ..dropping import check_stages, even_layers
from ..layer_signals import LayerRows, LayerSignals
from ..registry import register_dropper


@register_dropper
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Dropper):
    """Drops in stages the visual rows that the last word of the question attends to least, mean over heads.

    Attention is what the layer behind the cut makes of the rows in front of it. In training the rows in front of each
    trained answer ask, as a mean. Published with contiguous positions, for 32 layers.

    Args:
        shares: share of the visual rows at the entry that stays behind each stage.
        layers: layers that rows are dropped in front of, one per share; at equal distances by default, which is
            (8, 16, 24) of 32 for three.

    Source: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
    Reduction", CVPR 2025.
    """

    shares: tuple[float, ...] = option((0.5, 0.25, 0.125), shares_of)

    name = "pyramiddrop"
    source = "Xing et al., CVPR 2025"
    kind = "prune"
    scored_by = "own"
    positions = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self, "shares")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return even_layers(depth, len(self.shares))

    def count(self, n: int, stage: int) -> int:
        return int(n * self.shares[stage])

    def score(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Tensor:
        return signals.attention(rows.questions)

    def dial(self, t: float) -> PyramidDrop:
        return replace(self, shares=tuple((1 - t) ** (i + 1) for i in range(len(self.shares))))
