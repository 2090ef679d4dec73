"""Which patches go into one token: by their place alone (cells of the full grid, stretches where there is none), or
around centres."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import KeepMap, TokenMap, group_map
from ..ops.cells.density import nearest_centre
from ..ops.cells.regular import regular_cells
from ..ops.rows import stable_order
from .selection import own_counts, raster_order, real_rows
from .tokens import Tokens


class Groups(NamedTuple):
    """Groups of patches, prefix not counted.

    Attributes:
        heads: patch that heads every new token [B, K].
        assign: group of every patch [B, M], -1 for padding.
        valid: validity of the new tokens, prefix in front [B, num_prefix + K], or None without padding.
    """

    heads: Tensor
    assign: Tensor
    valid: Tensor | None


def by_place(tokens: Tokens, cells: tuple[int, int], remaining: Callable[[int], int]) -> Groups:
    """Cells of the grid for images that have all their patches, whatever their batch mates have lost; else stretches.

    Args:
        tokens: the tokens, in any order.
        cells: cells (down, right) of the full grid.
        remaining: tokens that are left of a number of patches in stretches.
    """
    layout, batch = tokens.layout, tokens.x.shape[0]
    if tokens.num_patches != layout.num_patches:
        return stretches(tokens, remaining)
    heads, assign = (part.expand(batch, -1) for part in regular_cells(layout.grid, cells, tokens.x.device))
    order = raster_order(tokens)
    if order is not None:
        heads, assign = order.gather(1, heads), assign.gather(1, stable_order(order))
    if tokens.valid is None:
        return Groups(heads, assign, None)
    whole, own = tokens.valid_patches.unsqueeze(1) == layout.num_patches, stretches(tokens, remaining)
    return Groups(torch.where(whole, heads, own.heads), torch.where(whole, assign, own.assign), own.valid)


def stretches(tokens: Tokens, remaining: Callable[[int], int]) -> Groups:
    """Patches that follow each other in raster order, as even in number as can be."""
    layout, patches = tokens.layout, tokens.num_patches
    kept, own = remaining(patches), own_counts(remaining, tokens)
    raster = tokens.original_positions()[:, layout.num_prefix :]
    count = torch.full_like(raster[:, :1], patches)
    if own is not None:
        real = tokens.valid[:, layout.num_prefix :]
        count, raster = real.sum(1, keepdim=True), torch.where(real, raster, raster.max() + 1)
    own_kept = torch.full_like(count, kept) if own is None else own
    order = stable_order(raster)
    rank = order.argsort(dim=1)
    stretch = rank * own_kept // count.clamp(min=1)
    assign = torch.where(rank < count, stretch, -1)
    slot = torch.arange(kept, device=raster.device).unsqueeze(0)
    first = -(-slot * count // own_kept.clamp(min=1))
    last = -(-(slot + 1) * count // own_kept.clamp(min=1)) - 1
    middle = (first + last).div(2, rounding_mode="floor").clamp(max=patches - 1)
    # heads of padding rows: any tokens that head nothing else, so that every index appears once
    heads = torch.where(slot < own_kept, order.gather(1, middle), -1)
    if own is not None:
        heads = _fill_unused(heads, assign)
    return Groups(heads, assign, real_rows(own, kept, layout.num_prefix))


def around_centres(centres: KeepMap, distances: Tensor, tokens: Tokens, weight: Tensor | None = None) -> TokenMap:
    """Every patch joins the nearest of some patches, these themselves.

    Args:
        centres: keeps the prefix and the centres; padding rows are centres of nothing.
        distances: of all patches [B, M, M].
        tokens: the tokens.
        weight: weight of every token in the means [B, N, 1]; None weighs all alike.
    """
    prefix, real = tokens.layout.num_prefix, centres.valid
    at = centres.idx[:, prefix:] - prefix
    nearest = nearest_centre(distances, at, None if real is None else real[:, prefix:]) + prefix
    own = centres.assign
    assign = torch.where(own < 0, torch.cat([own[:, :prefix], nearest], dim=1), own)
    if tokens.valid is not None:
        assign = torch.where(tokens.valid, assign, -1)
    return group_map(assign, own >= 0, centres.n_out, weight, real)


def _fill_unused(heads: Tensor, assign: Tensor) -> Tensor:
    """Replaces -1 in heads [B, K] by indices of padding patches (assign -1), each used once."""
    missing = heads < 0
    padding = stable_order(assign >= 0)  # padding first
    nth = (missing.long().cumsum(1) - 1).clamp(min=0)
    return torch.where(missing, padding.gather(1, nth), heads)
