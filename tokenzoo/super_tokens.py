"""Super tokens: every token of a map shares itself out among the 3 x 3 cells around its own.

Pure tensor code on maps with channels last. Work and memory are linear in the number of tokens: the nine super tokens
of a cell are gathered once a cell, not once a token, and what the tokens of a cell send to its neighbours is added up
before it is shifted.

Source: Huang, Zhou, Cao, He, Tan, "Vision Transformer with Super Token Sampling", CVPR 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import split_dim

SLOTS = 9  # a cell and its eight neighbours, in raster order
_OWN = 4  # the slot of the cell itself
_TINY = 1e-12  # of the published division by the mass


class Association(NamedTuple):
    """How the tokens of a map share themselves out among super tokens.

    Attributes:
        weights: share of every token in the super token of each slot [B, down, right, T, 9], T tokens a cell in raster
            order, float32 or wider. They sum to 1 over the slots, those beyond the edge of the map included.
        mass: what every super token receives in all [B, down, right, 1].
    """

    weights: Tensor
    mass: Tensor

    def collect(self, cells: Tensor) -> Tensor:
        """Super tokens: weighted means of the tokens [B, down, right, T, D], as [B, down, right, D]."""
        sums = self.weights.to(cells.dtype).transpose(-1, -2) @ cells  # [B, down, right, 9, D]
        return (gather_back(sums) / (self.mass + _TINY)).to(cells.dtype)

    def spread(self, supers: Tensor) -> Tensor:
        """Every token's mixture of the super tokens [B, down, right, D] around it, as [B, down, right, T, D]."""
        return self.weights.to(supers.dtype) @ gather_around(supers)

    def picture(self, cell: tuple[int, int]) -> Tensor:
        """The weights as a map of nine channels [B, 9, H, W], padding included."""
        batch, down, right = self.weights.shape[:3]
        return from_cells(self.weights, (down * cell[0], right * cell[1]), cell).permute(0, 3, 1, 2)


def to_cells(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """Cuts a map into cells, filled up with zeros on the right and at the bottom.

    Args:
        x: [B, H, W, C].
        cell: tokens of a cell (high, wide).

    Returns:
        [B, down, right, T, C], the T tokens of a cell in raster order.
    """
    high, wide = cell
    below, beside = -x.shape[1] % high, -x.shape[2] % wide
    if below or beside:
        x = F.pad(x, (0, 0, 0, beside, 0, below))
    return split_dim(split_dim(x, 2, -1, wide), 1, -1, high).transpose(2, 3).flatten(3, 4)


def from_cells(cells: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """The inverse of `to_cells`: [B, down, right, T, C] to [B, H, W, C], (H, W) = size, the padding cut off."""
    x = split_dim(cells, 3, *cell).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]]


def gather_around(supers: Tensor) -> Tensor:
    """The nine super tokens around every cell, zeros beyond the edge: [B, down, right, D] to [B, down, right, 9, D]."""
    down, right = supers.shape[1:3]
    framed = F.pad(supers, (0, 0, 1, 1, 1, 1))
    return torch.stack([framed[:, i : i + down, j : j + right] for i in range(3) for j in range(3)], dim=3)


def gather_back(sent: Tensor) -> Tensor:
    """Adds up what cells send to their nine neighbours; what goes beyond the edge is lost (`gather_around` transposed).

    Args:
        sent: [B, down, right, 9, D].

    Returns:
        [B, down, right, D].
    """
    down, right = sent.shape[1:3]
    framed = F.pad(sent, (0, 0, 0, 0, 1, 1, 1, 1))
    shifted = [framed[:, 2 - i : 2 - i + down, 2 - j : 2 - j + right, 3 * i + j] for i in range(3) for j in range(3)]
    return torch.stack(shifted).sum(dim=0)


def associate(cells: Tensor, iterations: int = 1, mask_borders: bool = False) -> Association:
    """Soft assignment of tokens to the super tokens around them, without gradient.

    Logits are scaled by the root of all channels. As published, neighbours beyond the edge of the map take part with
    logit zero (their share is lost) and so do the zeros that fill up incomplete cells.

    Args:
        cells: tokens by cell [B, down, right, T, C].
        iterations: rounds of assigning and averaging; 0 puts every token wholly into its own cell.
        mask_borders: leave neighbours beyond the edge out, so that no share is lost.

    Returns:
        The last assignment.
    """
    cells = cells.detach()
    batch, down, right, count, channels = cells.shape
    if iterations == 0:
        own = F.one_hot(torch.full((1,), _OWN, device=cells.device), SLOTS).float()
        weights = own.expand(batch, down, right, count, SLOTS)
        return Association(weights, weights.new_full((batch, down, right, 1), float(count)))
    supers = cells.mean(dim=3)
    beyond = gather_around(cells.new_ones(1, down, right, 1)).transpose(-1, -2) == 0 if mask_borders else None
    for round_ in range(iterations):
        logits = ((gather_around(supers) * channels**-0.5) @ cells.transpose(-1, -2)).transpose(-1, -2)
        if beyond is not None:
            logits = logits.masked_fill(beyond, float("-inf"))
        weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        found = Association(weights, gather_back(weights.sum(dim=3).unsqueeze(-1)))
        if round_ + 1 < iterations:
            supers = found.collect(cells)
    return found
