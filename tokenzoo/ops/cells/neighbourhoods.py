"""Windows of a map of tokens, rows around each of them, and what is pooled from them.

All sizes are Python integers, so that everything here is known before a model runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_windows(x: Tensor, side: int) -> Tensor:
    """Zeros at the bottom and on the right of a map [B, H, W, C], so that both sides are multiples."""
    down, right = -x.shape[1] % side, -x.shape[2] % side
    return F.pad(x, [0, 0, 0, right, 0, down]) if down or right else x


def to_windows(x: Tensor, side: int) -> Tensor:
    """A map [B, H, W, C] of whole windows, in raster order of windows: [B, M, side * side, C]."""
    down, right = x.shape[1] // side, x.shape[2] // side
    x = x.unflatten(2, (right, side)).unflatten(1, (down, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Undoes `to_windows`: [B, M, side * side, C] -> [B, H, W, C] for a map of this size (high, wide)."""
    x = x.unflatten(1, (grid[0] // side, grid[1] // side)).unflatten(3, (side, side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def pool_windows(x: Tensor, side: int, sample: int) -> Tensor:
    """The largest values of every window's bins, as adaptive pooling cuts and overlaps them.

    Args:
        x: map of whole windows [B, H, W, C].
        side: tokens of a window's side.
        sample: bins of a window's side.

    Returns:
        [B, sample * H / side, sample * W / side, C].
    """
    bins = [(i * side // sample, -(-(i + 1) * side // sample)) for i in range(sample)]
    down, right = x.shape[1] // side, x.shape[2] // side
    x = x.unflatten(1, (down, side))
    x = torch.stack([x[:, :, start:stop].amax(2) for start, stop in bins], 2).flatten(1, 2)
    x = x.unflatten(2, (right, side))
    return torch.stack([x[:, :, :, start:stop].amax(3) for start, stop in bins], 3).flatten(2, 3)


def rows_around(grid: tuple[int, int], side: int, reach: int, device: torch.device) -> Tensor:
    """Rows of a map that every window sees, centred on it; the upper left half of an odd rest is the smaller one.

    Args:
        grid: tokens (high, wide), whole windows.
        side: tokens of a window's side.
        reach: tokens of the side of what a window sees.
        device: where the rows are wanted.

    Returns:
        [M, reach * reach] int64; high * wide stands for places outside of the map.
    """
    (rows, inside_rows), (columns, inside_columns) = (_along(size, side, reach, device) for size in grid)
    places = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]  # [down, right, reach, reach]
    inside = inside_rows[:, None, :, None] & inside_columns[None, :, None, :]
    return places.masked_fill(~inside, grid[0] * grid[1]).flatten(2).flatten(0, 1)


def _along(size: int, side: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first = torch.arange(size // side, device=device) * side - (reach - side) // 2
    places = first[:, None] + torch.arange(reach, device=device)
    return places, (places >= 0) & (places < size)
