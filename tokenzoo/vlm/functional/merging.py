"""Decisions that fold rows into those that stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.rows import add_rows, stable_order, take_rows
from .deciding import deciding, top, unit


class Contextual(NamedTuple):
    """What `visionzip` decides.

    Attributes:
        dominant: rows that stay as they are, rising [B, D] int64.
        targets: rows that others are added to, rising [B, M] int64.
        sources: the others [B, S] int64.
        slot: target that each of them goes to, 0 .. M - 1 [B, S] int64; -1 where there are no targets.
    """

    dominant: Tensor
    targets: Tensor
    sources: Tensor
    slot: Tensor

    def contextual(self, x: Tensor) -> Tensor:
        """Values of the targets [B, M, C]: their own plus the mean of what goes to them, as released; x [B, N, C]."""
        own, counts = take_rows(x, self.targets), x.new_zeros(*self.targets.shape, 1)
        if self.sources.shape[1] == 0 or self.targets.shape[1] == 0:
            return own
        counts = add_rows(counts, self.slot, x.new_ones(*self.slot.shape, 1))
        total = add_rows(torch.zeros_like(own), self.slot, take_rows(x, self.sources))
        return own + total / counts.clamp(min=1)


@deciding
def visionzip(score: Tensor, metric: Tensor, dominant: int, contextual: int) -> Contextual:
    """The rows with the most attention, and some of the others that take in the rest by their keys.

    Args:
        score: attention of the class token [B, N].
        metric: keys, mean over heads [B, N, d].
        dominant: rows that stay as they are.
        contextual: rows that others are added to.

    Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025.
    """
    n = score.shape[1]
    best = top(score, dominant)
    taken = torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
    rest = stable_order(taken)[:, : n - dominant]
    step = max(1, rest.shape[1] // max(1, contextual))
    at = torch.arange(contextual, device=score.device) * step
    other = torch.ones(rest.shape[1], dtype=torch.bool, device=score.device)
    other[at] = False
    targets, sources = rest[:, at], rest[:, other]
    if contextual == 0:
        return Contextual(best, targets, sources, torch.full_like(sources, -1))
    keys = unit(metric)
    slot = torch.bmm(take_rows(keys, sources), take_rows(keys, targets).transpose(1, 2)).argmax(-1)
    return Contextual(best, targets, sources, slot)


@deciding
def outliers(score: Tensor) -> float:
    """Share of the scores [N] above the third quartile by more than 1.5 times the distance of the quartiles."""
    low, high = torch.quantile(score.float(), torch.tensor([0.25, 0.75], device=score.device)).tolist()
    return int((score > high + 1.5 * (high - low)).sum()) / len(score)


@deciding
def prumerge_rows(score: Tensor, keep: int | None = None, plus: bool = False) -> Tensor:
    """The rows that PruMerge or PruMerge+ keeps of one image.

    Args:
        score: attention of the class token [N].
        keep: how many; None for as many as there are outliers (and, plus, three times as many at even distances).
        plus: take rows at even distances too; of a given number a quarter by attention, the others so.

    Returns:
        [K] int64, by score, those at even distances behind them.
    """
    n = len(score)
    order = score.sort(descending=True, stable=True).indices
    if keep is not None:
        best = max(1, keep // 4) if plus else keep
        left = order[best:].sort().values
        even = torch.arange(keep - best, device=score.device) * len(left) // max(1, keep - best)
        return torch.cat([order[:best], left[even]])
    share = outliers(score) or 1 / n  # an image without outliers keeps its best row
    best = max(1, int(n * share))
    if not plus:
        return order[:best]
    # the released code divides by zero where more than a third are outliers
    even = torch.arange(0, n - 1, max(1, int(int(1 / share) / 3)), device=score.device)
    return torch.cat([order[:best], even[~torch.isin(even, order[:best])]])


@deciding
def prumerge_weights(score: Tensor, keys: Tensor, kept: Tensor, neighbours: int = 32) -> Tensor:
    """What PruMerge makes new rows of: themselves and their nearest neighbours, and one row more of all that go.

    Args:
        score: attention of the class token [N].
        keys: of the tower's last layer, all heads side by side [N, C].
        kept: rows that stay [K] int64.
        neighbours: how many others count in each.

    Returns:
        Weights [K + 1, N] of x in the new rows, the last one for the rows that go.

    Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.
    """
    n, at = len(score), torch.arange(len(kept), device=score.device)
    units = unit(keys)
    alike = units[kept] @ units.T
    alike[at, kept] = float("-inf")
    near = alike.topk(min(neighbours, n - 1), dim=1).indices
    weights = torch.zeros(len(kept) + 1, n, device=score.device)
    weights[:-1] = weights[:-1].scatter(1, near, score.float()[near])
    weights[at, kept] = 1.0
    weights[-1] = score.float().index_fill(0, kept, 0.0)
    return weights
