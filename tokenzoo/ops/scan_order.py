"""Prefix tokens stand in front in `Tokens` and somewhere in the sequence of a model that scans: there and back.

`rows` says where: the row of every prefix token in the scanned sequence, ascending. The same for all images as a tuple
of ints, or one per image for a single prefix token as a tensor [B, 1]. Patches keep their order either way.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .rows import take_rows

Rows: TypeAlias = "tuple[int, ...] | Tensor"


def to_scan(x: Tensor, rows: Rows) -> Tensor:
    """Tokens in front [B, N, D] -> the sequence as it is scanned [B, N, D]."""
    if isinstance(rows, Tensor):
        place = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return take_rows(x, torch.where(place < rows, place + 1, torch.where(place == rows, 0, place)))
    pieces, start = [], len(rows)
    for number, row in enumerate(rows):
        stop = len(rows) + row - number  # patches in front of this row
        pieces += [x[:, start:stop], x[:, number : number + 1]]
        start = stop
    return torch.cat([*pieces, x[:, start:]], dim=1) if rows not in ((), (0,)) else x


def from_scan(x: Tensor, rows: Rows) -> Tensor:
    """A scanned sequence [B, N, D] -> prefix tokens in front [B, N, D]."""
    if isinstance(rows, Tensor):
        patch = torch.arange(x.shape[1], device=x.device).unsqueeze(0) - 1
        return take_rows(x, torch.where(patch < 0, rows, torch.where(patch < rows, patch, patch + 1)))
    if rows in ((), (0,)):
        return x
    edges = [-1, *rows, x.shape[1]]
    patches = [x[:, low + 1 : high] for low, high in zip(edges, edges[1:])]
    return torch.cat([*(x[:, row : row + 1] for row in rows), *patches], dim=1)


def natural_rows(patches: Tensor, first: tuple[int, ...], total: int) -> Rows:
    """Rows of prefix tokens that stay between the patches that they stood between.

    Args:
        patches: raster positions of the patches that are left [B, K] int64.
        first: rows in the sequence of all patches.
        total: patches of the whole sequence.
    """
    before = [row - number for number, row in enumerate(first)]  # patches in front of each
    count = patches.shape[1]
    if all(n in (0, total) for n in before):
        return tuple(number + (count if n else 0) for number, n in enumerate(before))
    return (patches < before[0]).sum(1, keepdim=True)


def scan_positions(tokens_positions: Tensor, first: tuple[int, ...]) -> Tensor:
    """Rows in the full scanned sequence of tokens with prefix tokens in front.

    Args:
        tokens_positions: index of every token in the original sequence, prefix in front [B, N] int64.
        first: rows of the prefix tokens in the full scanned sequence.
    """
    prefix = len(first)
    patch = tokens_positions - prefix
    row = patch
    for number, at in enumerate(first):
        row = row + (patch >= at - number).long()
    fixed = torch.tensor((*first, 0), device=row.device)[tokens_positions.clamp(max=prefix)]
    return torch.where(patch < 0, fixed, row)
