"""Ways to pick rows that several selectors share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps import KeepMap
from ..ops.rows import stable_order


def best_rows(score: Tensor, keep: int) -> KeepMap:
    """The rows with the highest scores, in the order in which they stand; of equal ones the first.

    Args:
        score: [B, N].
        keep: how many.
    """
    order = score.detach().sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return KeepMap(order.sort(dim=1).values, score.shape[1])


def chosen_rows(index: Tensor, n: int) -> KeepMap:
    """Rows by their numbers [B, K], put into the order in which they stand; n rows in all."""
    return KeepMap(index.sort(dim=1).values, n)


def even_rows(n: int, keep: int, batch: int, device: torch.device) -> Tensor:
    """Every n / keep-th row [B, keep]: the middle ones of as many equal stretches."""
    index = torch.tensor([(2 * i + 1) * n // (2 * keep) for i in range(keep)], device=device)
    return index.expand(batch, -1)


def kept_rows(mask: Tensor) -> KeepMap:
    """The rows of a mask [B, N] bool; images that keep fewer than others repeat their last one, which changes nothing.

    Every image has to keep one at least.
    """
    counts = mask.sum(1, keepdim=True)
    order = stable_order(~mask)
    at = torch.arange(int(counts.max()), device=mask.device).expand(mask.shape[0], -1)
    return KeepMap(order.gather(1, torch.minimum(at, counts - 1)), mask.shape[1])


def middles(n: int, cells: int) -> Tensor:
    """The middle one of the rows that go into each of as many equal cells [cells]."""
    starts = [-(-cell * n // cells) for cell in range(cells + 1)]
    return torch.tensor([(first + last - 1) // 2 for first, last in zip(starts, starts[1:])])
