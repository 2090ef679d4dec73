"""Graphs over the patches of an image: neighbours on the grid, and patches that are alike, as lists of neighbours.

Xu, Wang, Chen, Li, Zhang, "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation", WACV 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import full_precision

_ROWS = 1024  # patches whose cosines with all others are in memory at once


def most_alike(x: Tensor, count: int, seen: Tensor | None = None) -> Tensor:
    """The other tokens with the largest cosine to every token [B, N, count], -1 where there are none left.

    Args:
        x: [B, N, C].
        count: neighbours per token; all others where there are fewer.
        seen: tokens that may be neighbours [B, N] bool; None for all.
    """
    n, found = x.shape[1], []
    with torch.no_grad(), full_precision(x):
        unit, index = F.normalize(x.float(), dim=-1), torch.arange(n, device=x.device)
        for start in range(0, n, _ROWS):
            part = unit[:, start : start + _ROWS]
            alike = part @ unit.transpose(1, 2)
            alike = alike.masked_fill(index[start : start + part.shape[1]].unsqueeze(1) == index, float("-inf"))
            if seen is not None:
                alike = alike.masked_fill(~seen.unsqueeze(1), float("-inf"))
            best = alike.topk(min(count, n - 1), dim=2)
            found.append(torch.where(best.values == float("-inf"), -1, best.indices))
    return torch.cat(found, dim=1)


def grid_degree(place: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many of the eight places around a place are on the grid; 0 for tokens without one (-1)."""
    (high, wide), row, column = grid, place.div(grid[1], rounding_mode="floor"), place % grid[1]
    rows = 1 + (row > 0).long() + (row < high - 1).long()
    columns = 1 + (column > 0).long() + (column < wide - 1).long()
    return torch.where(place < 0, 0, rows * columns - 1)


def touching(first: Tensor, second: Tensor, wide: int) -> Tensor:
    """Whether places touch, edges or corners; a place does not touch itself. Broadcasts."""
    rows = first.div(wide, rounding_mode="floor") - second.div(wide, rounding_mode="floor")
    columns = first % wide - second % wide
    near = (rows.abs() <= 1) & (columns.abs() <= 1) & (first != second)
    return near & (first >= 0) & (second >= 0)


def links(
    to: Tensor, source: Tensor, grid: tuple[int, int], spatial: bool, alike: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Entries of the normalised adjacency D^-1/2 G D^-1/2, D the row sums of G [B, K, P] float32.

    Args:
        to: places of the rows [B, K], -1 for none.
        source: places of the columns [B, P].
        grid: patches (high, wide).
        spatial: places that touch are linked.
        alike: places of the neighbours of the rows [B, K, M] and of the columns [B, P, M], -1 for none; None without.
    """
    wide, linked = grid[1], None
    degrees = [grid_degree(place, grid) if spatial else torch.zeros_like(place) for place in (to, source)]
    if spatial:
        linked = touching(to.unsqueeze(2), source.unsqueeze(1), wide)
    if alike is not None:
        for i, (place, neighbours) in enumerate(zip((to, source), alike)):
            counts = neighbours >= 0
            if spatial:
                counts = counts & ~touching(place.unsqueeze(2), neighbours, wide)
            degrees[i] = degrees[i] + counts.sum(2)
        semantic = (alike[0].unsqueeze(3) == source[:, None, None, :]).any(2) & (source >= 0).unsqueeze(1)
        linked = semantic if linked is None else linked | semantic
    to_degree, source_degree = (degree.clamp(min=1).float().rsqrt() for degree in degrees)
    return linked * to_degree.unsqueeze(2) * source_degree.unsqueeze(1)
