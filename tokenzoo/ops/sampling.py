"""Sampling by the inverse of a cumulative sum, without drawing anything (ATS: Fayyaz et al., ECCV 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_heights(
    scores: Tensor, heights: int, skip_lowest: Tensor | bool, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling: which tokens are nearest to some height of the cumulative score.

    With G the cumulative sum of the ascending scores, scaled to [0, 1], and g0 its smallest non-zero value, the heights
    are g0 + k (1 - g0) / (heights - 1). A token is picked if at least one height lies in its cell (the stretch of
    [0, 1] that is nearer to its G than to any other): counting heights up to each cell's upper end answers it in O(N).

    Args:
        scores: significance of every patch [B, M], not negative, zero for padding.
        heights: number of heights.
        skip_lowest: [B, 1] bool, or one for all images: scale so that the lowest token gets G = 0 and cannot be picked.
        candidates: only this many of the highest scores can be picked; None for all.

    Returns:
        picked: [B, M] bool in ascending order of score; the highest score is always picked.
        order: [B, M] patch number at each place of that order.
    """
    ascending, order = scores.float().sort(dim=1)
    total = (ascending / ascending.sum(1, keepdim=True).clamp(min=1e-30)).cumsum(1)
    if skip_lowest is not False:
        low = total[:, :1]
        total = total - (low if skip_lowest is True else torch.where(skip_lowest, low, torch.zeros_like(low)))
    span = total[:, -1:]
    g = torch.where(span > 0, total / span.clamp(min=1e-30), 1.0)
    first = g.masked_fill(g <= 0, 2.0).amin(1, keepdim=True).clamp(max=1.0)
    if candidates is not None and candidates < g.shape[1]:
        g = g[:, -candidates:]
    distance = (1 - first) / max(heights - 1, 1)
    middle = (g[:, :-1] + g[:, 1:]) / 2
    below = torch.where(distance > 0, ((middle - first) / distance.clamp(min=1e-30)).floor(), -1.0)
    below = F.pad(F.pad(below.clamp(-1, heights - 1), (1, 0), value=-1.0), (0, 1), value=heights - 1.0)
    picked = below[:, 1:] > below[:, :-1]
    missing = scores.shape[1] - picked.shape[1]
    if missing:
        picked = torch.cat([picked.new_zeros(picked.shape[0], missing), picked], dim=1)
    return picked, order
