"""catp: rows that stand for the others and are near the words of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..functional import catp
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class CATP(Selector):
    """Keeps rows that stand for all rows of the image and are near the mean word of its prompt, greedily.

    The first stage of CATP, made for prompts of several images, where half of the reduction is its. From the paper,
    without released code. A choice by the words of one turn of a chat stays for the next ones.

    Args:
        weight: of being near the words.

    Source: Li et al., "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context
    Learning", 2025.
    """

    weight: float = number(0.7, "give a weight such as 0.7", least=0)

    name = "catp"
    source = "Li et al., 2025"
    kind = "prune"
    unit = "image"
    reads = ("text",)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        # a prompt without words says nothing: its rows are all as near
        means = [words.float().mean(0) if len(words) else rows.x.new_zeros(rows.x.shape[-1]) for words in signals.text]
        return chosen_rows(catp(rows.x, torch.stack(means), keep, self.weight), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * n * dim
