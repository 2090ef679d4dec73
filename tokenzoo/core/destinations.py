"""Destinations that lie evenly over the image, for tokens in any order and for images with padding (tomesd).

Bolya, Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..maps import TokenMap
from ..ops.matching.bipartite import best_odd
from ..ops.matching.strided import best_destination, cell_split, stretch_split
from ..ops.rows import stable_order
from .adaptive import even_and_odd, merge_pairs
from .selection import own_counts, raster_order
from .tokens import Tokens


def by_cells(tokens: Tokens, cell: tuple[int, int], draw: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens that may merge [B or 1, S] and their destinations [B or 1, D]: one per cell, of stretches without a grid.

    Args:
        tokens: the tokens, in any order.
        cell: size of a cell (down, right).
        draw: picks the destination of each cell, as for `strided.cell_split`; None takes the top left.
    """
    layout, device = tokens.layout, tokens.x.device
    if tokens.num_patches == layout.num_patches and tokens.valid is None:
        src, dst = cell_split(layout.grid, cell, device, draw)
    else:
        src, dst = stretch_split(tokens.num_patches, cell[0] * cell[1], device)
    by_place = raster_order(tokens)
    if by_place is None:
        return src.unsqueeze(0) + layout.num_prefix, dst.unsqueeze(0) + layout.num_prefix
    return by_place[:, src] + layout.num_prefix, by_place[:, dst] + layout.num_prefix


def merge_by_image(
    tokens: Tokens, metric: Tensor, left: Callable[[int], int], cell: tuple[int, int] | None, draw: Tensor | None
) -> TokenMap:
    """Images with padding merge as many tokens into their destinations as they would alone.

    Args:
        tokens: the tokens; some are padding.
        metric: what similarity is measured on [B, N, D].
        left: patches that are left of a number of them.
        cell: size of a cell (down, right); None for even tokens into odd ones.
        draw: see `by_cells`.
    """
    prefix, patches, receives = tokens.layout.num_prefix, tokens.num_patches, None
    counts = (tokens.valid_patches.unsqueeze(1) - own_counts(left, tokens)).clamp(min=0)
    if cell is None:
        src, dst = even_and_odd(tokens)
        value, partner = best_odd(metric, prefix, tokens.valid, tokens.visible)
        partner = partner - prefix // 2
    else:
        src, dst = by_cells(tokens, cell, draw)
        if patches == tokens.layout.num_patches:  # some images may have all their patches
            src, dst, receives = _cells_or_stretches(tokens, cell, draw, dst)
        value, partner = best_destination(metric, src, dst, tokens.valid, tokens.visible, receives)
    length = prefix + max(left(patches), left(patches - 1))
    return merge_pairs(tokens, src, dst, value, partner, counts, length, True, None, receives)


def _cells_or_stretches(
    tokens: Tokens, cell: tuple[int, int], draw: Tensor | None, dst: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells for images that have all their patches, the given stretches for others; which tokens receive [B, N]."""
    whole = tokens.valid_patches.unsqueeze(1) == tokens.layout.num_patches
    cells = by_cells(tokens._replace(valid=None), cell, draw)[1].expand(tokens.x.shape[0], -1)
    unset = torch.zeros_like(tokens.valid)
    receives = torch.where(whole, unset.scatter(1, cells, True), unset.scatter(1, dst, True))
    prefix, patches = tokens.layout.num_prefix, tokens.num_patches
    place = stable_order(raster_order(tokens))  # of every patch in raster order
    order = stable_order(receives[:, prefix:].long() * patches + place) + prefix
    most, least = max(cells.shape[1], dst.shape[1]), min(cells.shape[1], dst.shape[1])
    return order[:, : patches - least], order[:, patches - most :], receives
