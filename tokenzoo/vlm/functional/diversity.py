"""Decisions that keep rows which differ from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.rows import take_rows
from .deciding import Cosines, deciding, likeness, ranked, row_of, unit


@deciding
def vispruner(score: Tensor, features: Tensor, keep: int, important: float = 0.5) -> Tensor:
    """The rows with the most attention, and of the others those that are left when alike ones go.

    Args:
        score: attention of the class token [B, N].
        features: what the tower gives [B, N, C].
        keep: rows that stay.
        important: share of them that is taken by attention.

    Returns:
        Rows that stay, rising [B, keep] int64.

    Source: Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
    ICCV 2025.
    """
    order, best = ranked(score), int(keep * important)
    rest, count = order[:, best:], keep - best
    if count == 0:
        return order[:, :best].sort(dim=1).values
    alike = likeness(unit(features))
    while rest.shape[1] > count:
        a, b = rest[:, ::2], rest[:, 1::2]
        gone = min(8, rest.shape[1] - count, a.shape[1])
        # whole rows are copied and added to faster than single columns of them are read
        others = torch.full_like(alike[:, 0], float("-inf")).scatter_(1, b, 0.0)
        nearest = take_rows(alike, a).add_(others.unsqueeze(1)).amax(-1)
        rest = torch.cat([a.gather(1, ranked(nearest)[:, gone:]), b], dim=1)
    return torch.cat([order[:, :best], rest], dim=1).sort(dim=1).values


@deciding
def divprune(x: Tensor, keep: int) -> Tensor:
    """Rows whose smallest distance to each other is large, found greedily; distances are 1 - cosine.

    Args:
        x: rows as the language model would see them [B, N, D].
        keep: rows that stay.

    Returns:
        Rows that stay, in the order in which they are chosen [B, keep] int64.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025.
    """
    alike = Cosines(x)
    last = alike.nearest().argmin(dim=1, keepdim=True)
    chosen, nearest = [last], alike.row(last).scatter(1, last, float("inf"))
    for _ in range(keep - 1):
        last = nearest.argmin(dim=1, keepdim=True)
        chosen.append(last)
        torch.maximum(nearest, alike.row(last), out=nearest).scatter_(1, last, float("inf"))
    return torch.cat(chosen, dim=1)


@deciding
def todre(x: Tensor, score: Tensor, keep: int) -> Tensor:
    """From a pivot on, rows with the smallest sum of cosines to those already chosen.

    Args:
        x: rows [B, N, D].
        score: the row with the highest one is the pivot [B, N].
        keep: rows that stay.

    Returns:
        Rows that stay, in the order in which they are chosen [B, keep] int64.

    Source: Li et al., "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", 2025.
    """
    alike, last = Cosines(x, keep), score.argmax(dim=1, keepdim=True)
    chosen, total = [last], torch.zeros_like(x[..., 0], dtype=torch.float32)
    for _ in range(keep - 1):
        last = total.add_(alike.row(last)).scatter_(1, last, float("inf")).argmin(dim=1, keepdim=True)
        chosen.append(last)
    return torch.cat(chosen, dim=1)


@deciding
def relevance(image: Tensor, text: Tensor, batch: bool = False) -> Tensor:
    """How far rows are from some texts, minus the mean cosine, brought to [0, 1]: what `cdpruner` weighs rows with.

    Args:
        image: rows in a space that they share with texts [B, N, E].
        text: texts [T, E].
        batch: smallest and largest values are those of the whole batch (the released code) and not of each image.

    Returns:
        [B, N] float32.
    """
    score = -torch.matmul(unit(image), unit(text).mean(0))
    dims = (0, 1) if batch else 1
    low, high = score.amin(dims, keepdim=True), score.amax(dims, keepdim=True)
    span = torch.where(high > low, high - low, torch.ones_like(high))  # rows that are all alike matter all alike
    return (score - low + 1e-6) / span


@deciding
def cdpruner(features: Tensor, weight: Tensor, keep: int) -> Tensor:
    """The most likely rows of a determinantal point process, whose kernel is weight * cosine * weight, greedily.

    Args:
        features: rows [B, N, D].
        weight: how much each matters [B, N], see `relevance`.
        keep: rows that stay.

    Returns:
        Rows that stay, in the order in which they are chosen [B, keep] int64.

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    NeurIPS 2025; greedy inference of Chen et al., NeurIPS 2018.
    """
    rows = unit(features) * weight.float().unsqueeze(-1)
    volume, channels = rows.square().sum(-1), rows.shape[2]  # volume: what a row would add to the determinant
    # parts of the Cholesky factor stand behind the channels, where products are taken off
    rows = torch.cat([rows, rows.new_zeros(*rows.shape[:2], keep)], dim=2)
    sign = torch.cat([rows.new_ones(channels), -rows.new_ones(keep)])
    chosen: list[Tensor] = []
    for step in range(keep):
        last = volume.argmax(dim=1, keepdim=True)
        chosen.append(last)
        # once rows span the space, what is left of a volume is rounding, and may be negative
        root = volume.gather(1, last).clamp_(min=1e-12).sqrt_()
        new = torch.bmm(rows, (row_of(rows, last) * sign).unsqueeze(-1)).squeeze(-1).div_(root)
        rows[:, :, channels + step] = new
        volume = volume.sub_(new.square_()).scatter_(1, last, float("-inf"))  # for good: less than that is the same
    return torch.cat(chosen, dim=1)
