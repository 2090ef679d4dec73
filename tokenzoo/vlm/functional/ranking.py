"""Decisions by attention alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .deciding import deciding, top


@deciding
def hiprune(shallow: Tensor, deep: Tensor, keep: int, alpha: float = 0.1, width: int | None = None) -> Tensor:
    """Anchors of a shallow layer with their neighbours, and the best rows of a deep one.

    Args:
        shallow: attention that every row gets in the shallow layer [B, N].
        deep: the same in the deep one [B, N].
        keep: rows that stay, below N.
        alpha: share of them that are anchors and neighbours, at most.
        width: rows per line of the grid; None for rows without a grid, which have two neighbours each.

    Returns:
        Rows that stay, rising [B, keep] int64.

    Source: Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language
    Models", 2025.
    """
    n = shallow.shape[1]
    anchors = min(round(keep * alpha / 5), keep // 5)  # a share near 1, rounded up, would ask for more than `keep`
    index = top(shallow, anchors)
    steps = (0, -1, 1) if width is None else (0, -1, 1, -width, width)
    around = torch.cat([(index + step).clamp(0, n - 1) for step in steps], dim=1)
    first = torch.zeros_like(deep, dtype=torch.bool).scatter(1, around, True)
    return top(deep.float().masked_fill(first, float("inf")), keep)


@deciding
def hired(first: Tensor, final: Tensor, part: Tensor, keep: int, alpha: float = 0.5) -> Tensor:
    """A share of the budget for the thumbnail, the rest for crops by what the thumbnail shows in them.

    Crops are counted in stretches of the thumbnail of equal length, one per crop, as the released code does.

    Args:
        first: attention of the class token in the first layer of the tower [N].
        final: the same in the layer that is handed on [N].
        part: crop of every row [N] int64, 0 for the thumbnail.
        keep: budget of all crops together.
        alpha: share of the budget that the thumbnail gets.

    Returns:
        Which rows stay [N] bool, at most `keep` (shares of crops are rounded down).

    Source: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models", AAAI 2025.
    """
    kept = torch.zeros_like(part, dtype=torch.bool)
    thumbnail = (part == 0).nonzero().flatten()
    crops = [(part == p).nonzero().flatten() for p in part.unique().tolist() if p != 0]
    if not crops:
        kept[top(final[None], keep)[0]] = True
        return kept
    n = len(thumbnail)
    own = min(max(1, int(keep * alpha)), n)
    rest = min(keep - own, sum(map(len, crops)))
    kept[thumbnail[top(final[thumbnail][None], own)[0]]] = True
    seen = top(first[thumbnail][None], int(n * (1 - alpha)))[0]
    counts = torch.bincount(seen * len(crops) // n, minlength=len(crops)).float()
    budgets = (counts / counts.sum().clamp(min=1) * rest).floor().long().tolist()
    for rows, budget in zip(crops, budgets):
        kept[rows[top(final[rows][None], min(budget, len(rows)))[0]]] = True
    return kept


@deciding
def fopru(score: Tensor, keep: int, width: int | None = None) -> Tensor:
    """The best rows, or whole lines of the grid by the sum of their scores.

    Args:
        score: attention that every row gets [B, N].
        keep: rows that stay.
        width: rows per line; None ranks rows one by one. Where lines do not fill the budget, the best rows of the next
            best line fill it.

    Returns:
        Rows that stay, rising [B, keep] int64.

    Source: Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", 2024.
    """
    if width is None:
        return top(score, keep)
    sums = score.float().unflatten(1, (-1, width)).sum(2)
    place = sums.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)  # rank of every line
    inside = score.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)  # rank of every row
    order = place.repeat_interleave(width, dim=1) * score.shape[1] + inside
    return order.argsort(dim=1)[:, :keep].sort(dim=1).values
