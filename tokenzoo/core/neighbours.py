"""Graphs over the patches of an image, by the places that they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.graph import degrees, links, most_alike
from ..ops.rows import take_rows
from .tokens import Tokens


def places(tokens: Tokens) -> Tensor:
    """Place of every patch on the grid [B, M], -1 for tokens without one and for padding."""
    prefix = tokens.layout.num_prefix
    place = tokens.original_positions()[:, prefix:] - prefix
    if tokens.valid is not None:
        place = place.masked_fill(~tokens.valid[:, prefix:], -1)
    return place.clamp(min=-1)


def alike_table(tokens: Tokens, count: int, spatial: bool) -> Tensor:
    """Places of the patches that are most alike, of every place, -1 for none; behind them, how many links a place has.

    Args:
        tokens: the tokens.
        count: neighbours of each, all others where there are fewer.
        spatial: places that touch are linked too.

    Returns:
        [B, H * W + 1, M + 1], the last row for tokens without a place.
    """
    layout = tokens.layout
    total, found = layout.num_patches, most_alike(tokens.x[:, layout.num_prefix :], count, tokens.seen_patches)
    place = places(tokens)
    if tokens.num_patches != total or tokens.positions is not None or tokens.valid is not None:
        there = place.unsqueeze(1).expand(-1, place.shape[1], -1).gather(2, found.clamp(min=0))
        # patches without a place are written to a row that is cut off
        table = place.new_full((place.shape[0], total + 1, found.shape[2]), -1)
        at = torch.where(place < 0, total, place).unsqueeze(2).expand_as(found)
        found = table.scatter(1, at, torch.where(found < 0, -1, there))[:, :-1]
        place = torch.arange(total, device=place.device).expand(place.shape[0], -1)
    degree = degrees(place, layout.grid, spatial, found)
    return F.pad(torch.cat([found, degree.unsqueeze(2)], dim=2), (0, 0, 0, 1), value=-1)


def linked(tokens: Tokens, to: Tensor, source: Tensor, spatial: bool, table: Tensor | None) -> Tensor:
    """What patches take of others along the edges of the normalised graph [B, K, P], see `ops.graph.links`.

    Args:
        tokens: the tokens.
        to: patches that take [B, K].
        source: patches that give [B, P].
        spatial: patches that touch are linked.
        table: `alike_table`, None without such edges.
    """
    place, grid, alike = places(tokens), tokens.layout.grid, None
    to, source = place.gather(1, to), place.gather(1, source)
    if table is None:
        degree = tuple(degrees(at, grid, spatial, None) for at in (to, source))
    else:
        none = table.shape[1] - 1
        rows = take_rows(table, torch.where(to < 0, none, to))
        alike, last = rows[..., :-1], table[..., -1].gather(1, torch.where(source < 0, none, source))
        degree = (rows[..., -1].clamp(min=1), last.clamp(min=1))
    return links(to, source, degree, grid[1], spatial, alike)
