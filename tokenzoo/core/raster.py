"""Tokens in the order of the grid again, behind any map."""

from __future__ import annotations

import torch

from ..maps import TokenMap
from ..maps.chain import arrange
from ..ops.rows import stable_order
from .tokens import Tokens


def in_raster_order(token_map: TokenMap, tokens: Tokens) -> TokenMap:
    """The map with its patches by the places of the tokens that head them, row by row.

    Tokens without a place (a fused rest) stand behind all others, padding behind these. Maps that give tokens back,
    move none, or whose tokens form a grid of their own, stay as they are.

    Args:
        token_map: the map of a method.
        tokens: the tokens in front of it.
    """
    stays = token_map.gate is not None or token_map.undo is not None or token_map.grid_out is not None
    if stays or token_map.n_out == tokens.layout.num_prefix:
        return token_map
    prefix, heads = tokens.layout.num_prefix, token_map.heads
    place = tokens.original_positions().gather(1, heads.clamp(min=0))[:, prefix:]
    last = prefix + tokens.layout.num_patches
    place = torch.where((place < 0) | (heads[:, prefix:] < 0), last, place)
    valid = token_map.valid
    if valid is None and tokens.valid is not None:
        valid = tokens.valid.gather(1, heads.clamp(min=0)) | (heads < 0)
    if valid is not None:
        place = torch.where(valid[:, prefix:], place, last + 1)
    rows = stable_order(place) + prefix
    front = torch.arange(prefix, device=rows.device).expand(rows.shape[0], -1)  # len() would fix an exported batch
    return arrange(token_map, torch.cat([front, rows], dim=1))
