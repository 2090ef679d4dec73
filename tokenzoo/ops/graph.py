"""Graphs over the patches of an image: neighbours on the grid, and patches that are alike, as lists of neighbours.

Xu, Wang, Chen, Li, Zhang, "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation", WACV 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import full_precision

_ROWS = 256  # patches whose cosines with all others are in memory at once


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


def degrees(place: Tensor, grid: tuple[int, int], spatial: bool, alike: Tensor | None) -> Tensor:
    """Row sums of the adjacency [B, N] int64, at least 1.

    Args:
        place: [B, N], -1 for none.
        grid: patches (high, wide).
        spatial: places that touch are linked.
        alike: places of the neighbours [B, N, M], -1 for none; None without.
    """
    found = grid_degree(place, grid) if spatial else torch.zeros_like(place)
    if alike is not None:
        counts = alike >= 0
        if spatial:
            counts = counts & ~touching(place.unsqueeze(2), alike, grid[1])
        found = found + counts.sum(2)
    return found.clamp(min=1)


def links(
    to: Tensor, source: Tensor, degree: tuple[Tensor, Tensor], wide: int, spatial: bool, alike: Tensor | None
) -> Tensor:
    """Entries of the normalised adjacency D^-1/2 G D^-1/2, D the row sums of G [B, K, P] float32.

    Args:
        to: places of the rows [B, K], -1 for none.
        source: places of the columns [B, P].
        degree: those of both, see `degrees`.
        wide: patches of a row of the grid.
        spatial: places that touch are linked.
        alike: places of the neighbours of the rows [B, K, M], -1 for none; None without.
    """
    linked = touching(to.unsqueeze(2), source.unsqueeze(1), wide) if spatial else None
    if alike is not None:
        semantic = (alike.unsqueeze(3) == torch.where(source < 0, -2, source)[:, None, None, :]).any(2)
        linked = semantic if linked is None else linked | semantic
    to_degree, source_degree = (each.float().rsqrt() for each in degree)
    return linked * to_degree.unsqueeze(2) * source_degree.unsqueeze(1)
