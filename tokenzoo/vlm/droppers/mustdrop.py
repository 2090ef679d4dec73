"""mustdrop: in stages, rows that no word looks at, in sum or alone."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.options import number
from ..base import Dropper
from ..dropping import words_behind
from ..layer_signals import LayerRows, LayerSignals, Left
from ..registry import register_dropper


@register_dropper
@dataclass(frozen=True, kw_only=True)
class MustDrop(Dropper):
    """Drops in stages the visual rows that words attend to little, in sum and each of them alone, mean over heads.

    The second and third stage of MustDrop. A row goes whose sum of attention from the words behind the first visual row
    is below a share of that of all visual rows, and whose largest attention from any of them is below a threshold.
    Attention is that of the layer in front of the cut; how many go depends on the prompt. When it has been read, rows
    that went at any stage also leave the caches of the layers from the one in front of the first cut on, so that all of
    these end with the same rows. The authors also keep rows that their first stage marked in the tower, which a dropper
    does not know. Published with contiguous positions.

    Args:
        together: share of the attention of all visual rows that the sum has to stay under; 0.001, 0.0012 and 0.011 as
            published for 192, 128 and 64 rows of 576.
        alone: attention that the largest has to stay under; 0.001, 0.001 and 0.01 as published.
        early_caches: whether caches of earlier layers are shortened, for steps behind the prompt; the third stage.
        layers: layers that rows are dropped in front of; (3, 7, 11, 15) by default, behind the published 2, 6, 10, 14.

    Source: Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024.
    """

    together: float = number(0.001, "give a share of the attention of all visual rows", least=0, most=1)
    alone: float = number(0.001, "give an attention to stay under", least=0, most=1)
    early_caches: bool = True

    name = "mustdrop"
    source = "Liu et al., 2024"
    kind = "prune"
    scored_by = "previous"
    positions = "contiguous"
    data_dependent = True

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (3, 7, 11, 15)

    def count(self, n: int, stage: int) -> int:
        return n

    def decide(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Left:
        words = words_behind(rows)
        if not bool(words.any()):  # nobody was asked
            return Left(rows.visual)
        total = signals.attention(words) * rows.visual  # a mean over words: the comparison is the same for sums
        little = total < self.together * total.sum(1, keepdim=True)
        return Left(rows.visual & ~(little & (signals.strongest(words) < self.alone)))

    def shrinks_caches(self) -> bool:
        return self.early_caches

    def macs(self, n: int, text: int, dim: int, heads: int, stage: int) -> int:
        return 2 * text * (n + text) * heads
