"""Windows of the grid, stretches where there is none, as places in the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.cells.windows import window_members
from ..ops.rows import split_dim
from .selection import raster_order
from .tokens import Tokens


def raster_members(tokens: Tokens, window: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Windows as places in the sequence [B or 1, W, n], and which of them hold real tokens only [B, W] (None: all).

    An image that has all its patches has the windows of the grid, whatever its batch mates have lost; any other one has
    stretches of as many patches that follow each other in raster order.

    Args:
        tokens: the tokens, in any order.
        window: patches of a window (down, right).
    """
    n, device, layout = window[0] * window[1], tokens.x.device, tokens.layout
    by_place, whole = raster_order(tokens), tokens.num_patches == layout.num_patches
    windows = window_members(layout.grid, window, device) if whole else None
    if whole and tokens.valid is None:
        return _at(by_place, windows), None
    count = tokens.num_patches // n
    stretches = torch.arange(count * n, device=device).view(count, n)
    members = _at(by_place, stretches)
    if tokens.valid is None:
        return members, None
    left = tokens.valid_patches.unsqueeze(1)
    real = stretches.amax(1) < left if count else torch.zeros_like(left[:, :0], dtype=torch.bool)
    if not whole:
        return members, real
    complete, spare = left == layout.num_patches, count - len(windows)
    is_window = torch.arange(count, device=device) < len(windows)
    windows = _at(by_place, F.pad(windows, (0, 0, 0, spare)))
    return torch.where(complete.unsqueeze(2), windows, members), torch.where(complete, is_window, real)


def _at(by_place: Tensor | None, template: Tensor) -> Tensor:
    """Places in the sequence [B or 1, W, n] of places in raster order [W, n]; None where that is the sequence."""
    if by_place is None:
        return template.unsqueeze(0)
    return split_dim(by_place[:, template.flatten()], 1, *template.shape)
