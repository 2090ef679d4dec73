"""How many scores of an image stand out from its others (ALGM).

Norouzi, Orlova, de Geus, Dubbelman, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic
Segmentation with Plain Vision Transformers", CVPR 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor


def above_threshold(
    value: Tensor, real: Tensor | None, block: int, over_batch: bool, some_hidden: bool = False
) -> Tensor:
    """How many scores of each image lie at or above mean + standard deviation / block number [B, 1].

    Args:
        value: scores [B, E].
        real: [B, E] bool, False for padding; None without.
        block: number of the block, counted from 1.
        over_batch: one threshold from the averages over the batch, as released; else each image has its own.
        some_hidden: a mask may hide tokens: those score inf and all merge, and those without a visible partner, below
            -2, do not; neither have a part in the threshold.
    """
    real = torch.ones_like(value, dtype=torch.bool) if real is None else real
    hidden = None
    if some_hidden:
        hidden = (real & (value == float("inf"))).sum(1, keepdim=True)
        real = real & (value > -2) & (value < float("inf"))
    count = real.sum(1, keepdim=True)
    seen = torch.where(real, value, 0.0)
    mean = seen.sum(1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(real, (value - mean).square(), 0.0).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    deviation = variance.sqrt()
    if over_batch:
        mean, deviation = mean.mean(0, keepdim=True), deviation.mean(0, keepdim=True)
    above = (real & (value >= mean + deviation / block)).sum(1, keepdim=True)
    # one score alone has no deviation: there is nothing that it could stand out from
    above = torch.where(count > 1, above, 0)
    return above if hidden is None else above + hidden
