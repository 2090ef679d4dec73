"""Overlapping square windows of a map: cut out, and put back as the mean of all that hold a place."""

from __future__ import annotations

import torch
from torch import Tensor


def window_starts(length: int, size: int, step: int) -> list[int]:
    """Where windows begin along a side; the last one is moved back so that it ends with the side.

    Args:
        length: places along the side, at least `size`.
        size: side of a window.
        step: places from one window to the next.
    """
    return [*range(0, length - size, step), length - size]


def _places(length: int, size: int, step: int, device: torch.device) -> Tensor:
    starts = torch.tensor(window_starts(length, size, step), device=device)
    return starts.unsqueeze(1) + torch.arange(size, device=device)  # [windows, size]


def cut_windows(x: Tensor, size: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """Windows [B, C, rows, columns, h, w] of a map.

    Args:
        x: [B, C, H, W].
        size: (h, w) of a window, no larger than the map.
        step: places from one window to the next, down and across.
    """
    rows = _places(x.shape[2], size[0], step[0], x.device)
    columns = _places(x.shape[3], size[1], step[1], x.device)
    return x[:, :, rows[:, None, :, None], columns[None, :, None, :]]


def join_windows(windows: Tensor, grid: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """The map [B, C, H, W] whose every place is the mean over the windows that hold it.

    Args:
        windows: [B, C, rows, columns, h, w], as `cut_windows` gives them.
        grid: (H, W).
        step: places from one window to the next, down and across.
    """
    rows = _places(grid[0], windows.shape[4], step[0], windows.device).flatten()
    columns = _places(grid[1], windows.shape[5], step[1], windows.device).flatten()
    x = windows.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # [B, C, rows * h, columns * w]
    for dim, length, places in ((2, grid[0], rows), (3, grid[1], columns)):
        shape = [length if axis == dim else side for axis, side in enumerate(x.shape)]
        held = torch.bincount(places, minlength=length).to(x.dtype)
        x = x.new_zeros(shape).index_add(dim, places, x) / held.view([length, 1] if dim == 2 else [length])
    return x
