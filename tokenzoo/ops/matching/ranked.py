"""Ranking by score: the best tokens stay, the next ones merge into these, the rest goes.

Source: Chen, Shao, Xu, et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV
2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import take_rows
from .bipartite import best_partner, with_rank, without_hidden


def ranked_partners(
    scores: Tensor,
    units: Tensor,
    kept: int,
    stays: int,
    real: Tensor | None = None,
    own_kept: Tensor | None = None,
    own_stays: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order of tokens by score, and for all behind the first `stays` which of these they merge into.

    Args:
        scores: [B, T].
        units: what similarity is measured on, of unit length [B, T, D].
        kept: tokens that are not dropped.
        stays: tokens of these that stay, the best ones; the others merge.
        real: [B, T] bool where there is padding, None without; padding fills up the rows of those that stay.
        own_kept: `kept` of each image [B, 1], needed with `real`.
        own_stays: `stays` of each image [B, 1], needed with `real`.
        visible: [B, T] bool; hidden tokens rank behind all others. None without a mask.

    Returns:
        Order [B, T], the place among the first `stays` of it that every later token goes to [B, T - stays] (-1 for
        none), and the cosine with the token there.
    """
    total = scores.shape[1]
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    matched = kept - stays
    if real is not None:
        # all patches of an image that keeps all stay in their places: alone, nothing would be done
        place = torch.arange(total, 0, -1, device=scores.device, dtype=torch.float32)
        scores = torch.where(own_stays < real.sum(1, keepdim=True), scores, place)
        scores, matched = scores.masked_fill(~real, float("-inf")), total - stays
    order = scores.argsort(dim=1, descending=True)
    merges = receives = None
    if real is not None:
        rank = torch.arange(total, device=order.device).expand_as(order)
        count = real.sum(1, keepdim=True)
        # those that stay first, then padding, then those that merge, then those that are dropped
        key = torch.where(rank < own_stays, rank, torch.where(rank >= count, rank - total, rank) + 2 * total)
        back = key.argsort(dim=1)
        order, rank = order.gather(1, back), rank.gather(1, back)
        merges = (rank >= own_stays) & (rank < own_kept)
        merges, receives = merges[:, stays:], rank[:, :stays] < own_stays
    first, behind = order[:, :stays], order[:, stays : stays + matched]
    a, b = take_rows(units, behind), take_rows(units, first)
    if real is None and visible is None:
        cosine, partner = best_partner(a, b)
    else:
        bias = torch.zeros_like(first, dtype=a.dtype)
        if visible is not None:
            bias = bias.masked_fill(~visible.gather(1, first), -4.0)
        if receives is not None:
            bias = bias.masked_fill(~receives, -8.0)
        cosine, partner = best_partner(*with_rank(a, b, bias))
        if visible is not None:
            cosine, partner = without_hidden(cosine, partner, stays if own_stays is None else own_stays)
        if merges is not None:
            partner = torch.where(merges, partner, -1)
    rest = (0, total - stays - matched)
    return order, F.pad(partner, rest, value=-1), F.pad(cosine, rest)
