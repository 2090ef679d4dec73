"""MixToken: the box of patches that comes from another image of the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def random_box(grid: tuple[int, int], generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
    """A box that covers a uniform share of the grid, its centre uniform, cut at the edges.

    Args:
        grid: patches (high, wide).
        generator: source of randomness, on the CPU.

    Returns:
        (top, left, bottom, right), the last two exclusive.
    """
    share = torch.rand((), generator=generator).item()
    spans = []
    for side in grid:
        length = int(side * share**0.5)
        centre = int(torch.randint(side, (), generator=generator))
        spans.append((max(0, centre - length // 2), min(side, centre + length // 2)))
    (top, bottom), (left, right) = spans
    return top, left, bottom, right


def box_mask(grid: tuple[int, int], box: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """True inside a box of patches: [high * wide] in raster order."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    top, left, bottom, right = box
    down, beside = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (down.unsqueeze(1) & beside).flatten()
