"""Windows of neighbours that are alike become one row each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.cells.windows import window_members, window_similarity
from .deciding import deciding


@deciding
def window_likeness(x: Tensor, grid: tuple[int, int], window: tuple[int, int] = (3, 3)) -> Tensor:
    """Mean cosine over all pairs of rows in each window [B, W] float32; rest lines and columns belong to none.

    Args:
        x: rows, line by line [B, high * wide, C].
        grid: (high, wide).
        window: rows per window, (down, right).
    """
    return window_similarity(x, window_members(grid, window, x.device)[None])


@deciding
def merge_windows(likeness: Tensor, grid: tuple[int, int], window: tuple[int, int], count: int) -> Tensor:
    """New row of every old one where the most alike windows become one row each.

    Args:
        likeness: of the windows of one image [W], see `window_likeness`.
        grid: (high, wide) of the rows.
        window: (down, right).
        count: how many windows merge.

    Returns:
        [N] int64: windows first, the most alike in front, then rows in none of them as they stand.

    Source: Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024
    (MustDrop), with the windows of ALGM.
    """
    members = window_members(grid, window, likeness.device)
    best = likeness.sort(descending=True, stable=True).indices[:count]
    assign = torch.full((grid[0] * grid[1],), -1, device=likeness.device)
    assign[members[best].flatten()] = torch.arange(count, device=likeness.device).repeat_interleave(members.shape[1])
    alone = assign < 0
    return torch.where(alone, alone.cumsum(0) - 1 + count, assign)
