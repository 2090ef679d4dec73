"""Cells that divide a grid as evenly as whole patches allow."""

from __future__ import annotations

import torch
from torch import Tensor


def regular_cells(grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Head of every cell [1, K] (its middle patch) and cell of every patch [1, M].

    Args:
        grid: patches (high, wide).
        cells: cells (down, right), at most as many.
        device: where to make the indices.
    """

    def axis(length: int, count: int) -> tuple[Tensor, Tensor]:
        cell = torch.arange(length, device=device) * count // length
        index = torch.arange(count + 1, device=device)
        first = (index * length + count - 1) // count
        return cell, (first[:-1] + first[1:] - 1) // 2

    (rows, row_heads), (columns, column_heads) = axis(grid[0], cells[0]), axis(grid[1], cells[1])
    assign = rows.unsqueeze(1) * cells[1] + columns
    heads = row_heads.unsqueeze(1) * grid[1] + column_heads
    return heads.reshape(1, -1), assign.reshape(1, -1)
