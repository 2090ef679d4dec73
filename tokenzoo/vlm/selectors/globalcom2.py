"""globalcom2: shares of crops, and their rows, by what the thumbnail shows in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..functional import globalcom2
from ..picking import best_rows, kept_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Selector):
    """Keeps the rows that the class token points to, more of crops that the thumbnail shows as important.

    Scores are the class token's logits in the tower's last layer, mean over heads. A crop's share of its rows grows
    with the scores of its cell of the thumbnail; inside of it, its own scores and those of the thumbnail count alike.
    Shares are rounded down and those of crops of unequal size do not make up for each other, so that `keep` is met more
    or less. Rows stay in order, which those of the thumbnail do not in the released code. Images without crops are
    ranked whole. Of videos, the first frame counts as the thumbnail.

    Args:
        temperature: of the softmax that spreads shares over crops.

    Source: Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", AAAI 2026.
    """

    temperature: float = number(10.0, "give a temperature such as 10", above=0)

    name = "globalcom2"
    source = "Liu et al., AAAI 2026"
    kind = "prune"
    unit = "image"
    reads = ("tower",)
    class_row = True
    data_dependent = True

    def layers(self, depth: int) -> tuple[int, ...]:
        return (-1,)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        score, share = signals.class_logits(-1), keep / rows.length
        if rows.part is None or not rows.part.any():
            return best_rows(score, keep)
        each = zip(score, rows.part, rows.place)
        return kept_rows(torch.stack([globalcom2(*image, share, self.temperature) for image in each]))

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads
