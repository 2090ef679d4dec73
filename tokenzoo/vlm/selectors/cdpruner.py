"""cdpruner: rows that differ, weighted by the words of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...maps import KeepMap
from ..base import Selector
from ..functional import cdpruner, relevance
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class CDPruner(Selector):
    """Keeps the rows that span the largest volume, weighted by what the words of the prompt say about each, greedily.

    The kernel of the determinantal point process is cosines of rows, weighted by minus the mean cosine of a row and the
    words, scaled to [0, 1] per image. The authors take cosines of a CLIP with its text tower; vision-language models
    have none, so that rows and words are compared as the language model sees them. A choice by the words of one turn of
    a chat stays for the next ones.

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    NeurIPS 2025.
    """

    name = "cdpruner"
    source = "Zhang et al., NeurIPS 2025"
    kind = "prune"
    unit = "image"
    reads = ("text",)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        # a prompt without words says nothing: its rows count alike
        weight = [
            relevance(x[None], words)[0] if len(words) else x.new_ones(len(x), dtype=torch.float32)
            for x, words in zip(rows.x, signals.text)
        ]
        return chosen_rows(cdpruner(rows.x, torch.stack(weight), keep), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * keep * (dim + keep)
