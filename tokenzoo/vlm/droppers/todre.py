"""todre: all visual rows at once, where words and images no longer look at each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ..base import Dropper
from ..dropping import check_single, words_behind
from ..layer_signals import LayerRows, LayerSignals, Left
from ..registry import register_dropper


@register_dropper
@dataclass(frozen=True, kw_only=True)
class ToDRE(Dropper):
    """Drops all visual rows of a prompt once words and visual rows attend to each other less than a threshold, or none.

    The second stage of ToDRE, from the paper, without released code. Compared are the share of the attention of words
    that goes to visual rows, and that of visual rows that goes to words, mean over heads and rows, in the layer behind
    the cut; words are those behind the first visual row. Attention is causal: with one image and no words within it,
    the second share is 0. Published with original positions.

    Args:
        threshold: share that both have to stay under.
        layers: the one layer that rows are dropped in front of; at 7/8 of the depth by default.

    Source: Li et al., "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", 2025.
    """

    threshold: float = number(0.1, "give the share of attention to stay under", least=0, most=1)

    name = "todre"
    source = "Li et al., 2025"
    kind = "prune"
    scored_by = "own"
    positions = "original"
    data_dependent = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_single(self)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (7 * depth // 8,)

    def count(self, n: int, stage: int) -> int:
        return n

    def decide(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Left:
        visual, words = rows.visual, words_behind(rows)
        to_visual = (signals.attention(words) * visual).sum(1)
        asking = visual & (words.long().cumsum(1) > 0)  # others see none of these words
        share = asking.sum(1) / visual.sum(1).clamp(min=1)
        to_words = (signals.attention(asking) * words).sum(1) * share
        gone = torch.maximum(to_visual, to_words) < self.threshold
        gone = gone & words.any(1)  # nobody was asked
        return Left(visual & ~gone.unsqueeze(1))

    def macs(self, n: int, text: int, dim: int, heads: int, stage: int) -> int:
        return text * (n + text) * heads
