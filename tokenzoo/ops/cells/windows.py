"""Windows of neighbours in a grid, and how alike the patches of each are (ALGM).

Norouzi, Orlova, de Geus, Dubbelman, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic
Segmentation with Plain Vision Transformers", CVPR 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import split_dim, take_rows


def window_members(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """Patches of every whole window in raster order [W, n]; rest rows and columns belong to none."""
    (high, wide), (down, right) = grid, window
    index = torch.arange(high * wide, device=device).view(high, wide)
    index = index[: high - high % down, : wide - wide % right]
    return split_dim(split_dim(index, 0, -1, down), 2, -1, right).transpose(1, 2).flatten(2).flatten(0, 1)


def window_similarity(x: Tensor, members: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens in each window [B, W] float32.

    Unit vectors u obey |sum u|^2 = n + sum of all ordered pairs, so no pair is ever formed.

    Args:
        x: tokens [B, M, C].
        members: tokens of every window [B, W, n], the same for all images if B is 1.
    """
    n = members.shape[2]
    rows = members.expand(x.shape[0], -1, -1).flatten(1)
    units = split_dim(take_rows(F.normalize(x.float(), dim=-1), rows), 1, -1, n)
    return (units.sum(2).square().sum(-1) - n) / (n * (n - 1))


def hidden_windows(score: Tensor, visible: Tensor, members: Tensor, first: bool) -> Tensor:
    """Scores of windows [B, W] where a mask hides some patches: mixed ones come last.

    Args:
        score: score of every window [B, W].
        visible: patches that are not hidden [B, M] bool.
        members: patches of every window [B or 1, W, n].
        first: windows that are all hidden come first; else they come last too.
    """
    seen = visible.gather(1, members.expand(score.shape[0], -1, -1).flatten(1)).unflatten(1, members.shape[1:])
    none, every = ~seen.any(2), seen.all(2)
    score = score.masked_fill(~every, torch.finfo(score.dtype).min)
    return score.masked_fill(none, float("inf")) if first else score
