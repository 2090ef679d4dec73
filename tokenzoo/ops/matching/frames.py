"""Which tokens of several images in a row may merge, and into which ones (FastVGGT's partition).

Shen, Zhang, Qu, Cao, "FastVGGT: Training-Free Acceleration of Visual Geometry Transformer", arXiv 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import stable_order
from .strided import cell_destinations


def frame_destinations(
    frames: int,
    grid: tuple[int, int],
    stride: tuple[int, int],
    device: torch.device,
    draw: Tensor | None = None,
    special: int = 0,
) -> Tensor:
    """[N] bool, tokens that others may merge into: all of the first image, elsewhere one patch of every whole cell.

    Args:
        frames: images in the sequence, each its special tokens and then its patches in raster order.
        grid: patches of each (high, wide).
        stride: size of a cell (down, right); patches where no whole cell fits are no destinations.
        device: where to make the mask.
        draw: number in [0, 1) for every cell of the images behind the first that picks its patch [frames - 1, D]; None
            takes the top left.
        special: tokens in front of the patches of each image, all of which are destinations.
    """
    length = special + grid[0] * grid[1]
    index = torch.arange(frames * length, device=device)
    start = torch.arange(1, frames, device=device).unsqueeze(1) * length + special
    picked = start + cell_destinations(grid, stride, device, draw)
    # of integers: the TorchScript tracer scatters no flags
    return ((index < length) | (index % length < special)).long().scatter(0, picked.flatten(), 1) > 0


def stretch_destinations(index: Tensor, first: Tensor | int, length: int) -> Tensor:
    """The same of patches that form no grid: the first ones, and of those behind them one of every stretch.

    Args:
        index: place of each patch in raster order.
        first: patches in front that all are destinations.
        length: patches of a stretch.
    """
    return (index < first) | ((index - first) % length == 0)


def spread_step(n: int, count: int) -> int:
    """Distance between `count` of n tokens that lie evenly over the sequence, the first of them in front."""
    return n // max(1, count)


def frame_parts(receives: Tensor, kept: Tensor, sources: int, destinations: int) -> tuple[Tensor, Tensor]:
    """Tokens that may merge [S] and their destinations [D], both ascending.

    Args:
        receives: [N] bool, the destinations.
        kept: tokens that must not merge [P].
        sources: S, tokens that are neither.
        destinations: D.
    """
    protected = torch.zeros_like(receives, dtype=torch.int64).scatter(0, kept, 1)
    order = stable_order(torch.where(receives, 2, protected).unsqueeze(0)).squeeze(0)
    return order[:sources], order[receives.shape[0] - destinations :]
