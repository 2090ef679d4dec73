"""mmtok: rows that cover the words of the prompt and the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.options import number
from ...maps import KeepMap
from ..base import Selector
from ..functional import mmtok
from ..picking import chosen_rows
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class MMTok(Selector):
    """Keeps rows that cover the words of the prompt, and all rows of the image, as well as they can, greedily.

    How well a row covers a word or another row is a softmax of cosines. The authors leave stop words and suffixes of
    the question out; here all words of the prompt around the images count. A choice by the words of one turn of a chat
    stays for the next ones.

    Args:
        alpha: weight of covering the image against that of covering the words.
        text_temperature: of the softmax between words and rows.
        image_temperature: of that between rows, on what the tower gives.

    Source: Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", 2025.
    """

    alpha: float = number(0.5, "give a weight such as 0.5", least=0)
    text_temperature: float = number(0.02, "give a temperature such as 0.02", above=0)
    image_temperature: float = number(0.2, "give a temperature such as 0.2", above=0)

    name = "mmtok"
    source = "Dong et al., 2025"
    kind = "prune"
    unit = "image"
    reads = ("text", "features")

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> KeepMap:
        options = (keep, self.alpha, self.text_temperature, self.image_temperature)
        found = [mmtok(words, x, tower, *options) for words, x, tower in zip(signals.text, rows.x, rows.features)]
        return chosen_rows(torch.stack(found), rows.length)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * n * heads
