"""Graphs over the patches of an image, by the places that they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.graph import links, most_alike
from ..ops.rows import take_rows
from .tokens import Tokens


def places(tokens: Tokens) -> Tensor:
    """Place of every patch on the grid [B, M], -1 for tokens without one and for padding."""
    prefix = tokens.layout.num_prefix
    place = tokens.original_positions()[:, prefix:] - prefix
    if tokens.valid is not None:
        place = place.masked_fill(~tokens.valid[:, prefix:], -1)
    return place.clamp(min=-1)


def alike_table(tokens: Tokens, count: int) -> Tensor:
    """Places of the patches that are most alike, of every place [B, H * W + 1, M]; -1 for none, as in the last row.

    Args:
        tokens: the tokens.
        count: neighbours of each, all others where there are fewer.
    """
    layout = tokens.layout
    total, found = layout.num_patches, most_alike(tokens.x[:, layout.num_prefix :], count, tokens.seen_patches)
    if tokens.num_patches == total and tokens.positions is None and tokens.valid is None:
        return F.pad(found, (0, 0, 0, 1), value=-1)
    place = places(tokens)
    there = place.unsqueeze(1).expand(-1, place.shape[1], -1).gather(2, found.clamp(min=0))
    # patches without a place are written to a row that is cut off
    table = place.new_full((place.shape[0], total + 1, found.shape[2]), -1)
    at = torch.where(place < 0, total, place).unsqueeze(2).expand_as(found)
    table = table.scatter(1, at, torch.where(found < 0, -1, there))
    return F.pad(table[:, :-1], (0, 0, 0, 1), value=-1)


def linked(tokens: Tokens, to: Tensor, source: Tensor, spatial: bool, table: Tensor | None) -> Tensor:
    """What patches take of others along the edges of the normalised graph [B, K, P], see `ops.graph.links`.

    Args:
        tokens: the tokens.
        to: patches that take [B, K].
        source: patches that give [B, P].
        spatial: patches that touch are linked.
        table: `alike_table`, None without such edges.
    """
    place, alike = places(tokens), None
    to, source = place.gather(1, to), place.gather(1, source)
    if table is not None:
        none = table.shape[1] - 1
        alike = tuple(take_rows(table, torch.where(at < 0, none, at)) for at in (to, source))
    return links(to, source, tokens.layout.grid, spatial, alike)
