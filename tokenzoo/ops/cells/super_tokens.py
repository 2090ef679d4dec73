"""Super tokens: every token of a map shares itself out among the 3 x 3 cells around its own.

Pure tensor code on maps with channels last. Work and memory are linear in the number of tokens: the nine super tokens
of a cell are gathered once per cell, not once per token, and what the tokens of a cell send to its neighbours is added
up before it is shifted.

Source: Huang, Zhou, Cao, He, Tan, "Vision Transformer with Super Token Sampling", CVPR 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SLOTS = 9  # a cell and its eight neighbours, in raster order
_OWN = 4  # the slot of the cell itself


class Association(NamedTuple):
    """How the tokens of a map share themselves out among super tokens.

    Attributes:
        weights: share of every token in the super token of each slot [B, down, right, T, 9], T tokens per cell in
            raster order, float32 or wider. They sum to 1 over the slots, those beyond the edge of the map included.
        mass: what every super token receives in all [B, down, right, 1].
    """

    weights: Tensor
    mass: Tensor

    def collect(self, cells: Tensor) -> Tensor:
        """Super tokens: weighted means of the tokens [B, down, right, T, D], as [B, down, right, D]."""
        return collect(self.weights, self.mass, cells)

    def spread(self, supers: Tensor) -> Tensor:
        """Every token's mixture of the super tokens [B, down, right, D] around it, as [B, down, right, T, D]."""
        return spread(self.weights, supers)

    def picture(self, cell: tuple[int, int]) -> Tensor:
        """The weights as a map of nine channels [B, 9, H, W], padding included."""
        batch, down, right = self.weights.shape[:3]
        return from_cells(self.weights, (down * cell[0], right * cell[1]), cell).permute(0, 3, 1, 2)


def collect(weights: Tensor, mass: Tensor, cells: Tensor) -> Tensor:
    """`Association.collect` as a function, which TorchScript can read."""
    sums = weights.to(cells.dtype).transpose(-1, -2) @ cells  # [B, down, right, 9, D]
    return (gather_back(sums) / (mass + 1e-12)).to(cells.dtype)  # as in the published division


def spread(weights: Tensor, supers: Tensor) -> Tensor:
    """`Association.spread` as a function, which TorchScript can read."""
    return weights.to(supers.dtype) @ gather_around(supers)


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
        x = F.pad(x, [0, 0, 0, beside, 0, below])
    # every size is named: TorchScript takes no star, and a size left to be inferred is ambiguous without images
    down, right = x.shape[1] // high, x.shape[2] // wide
    x = x.reshape(x.shape[0], down, high, right, wide, x.shape[3])
    return x.transpose(2, 3).flatten(3, 4)


def from_cells(cells: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """The inverse of `to_cells`: [B, down, right, T, C] to [B, H, W, C], (H, W) = size, the padding cut off."""
    batch, down, right, channels = cells.shape[0], cells.shape[1], cells.shape[2], cells.shape[4]
    x = cells.reshape(batch, down, right, cell[0], cell[1], channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]]


def gather_around(supers: Tensor) -> Tensor:
    """The nine super tokens around every cell, zeros beyond the edge: [B, down, right, D] to [B, down, right, 9, D]."""
    down, right = supers.shape[1], supers.shape[2]
    framed = F.pad(supers, [0, 0, 1, 1, 1, 1])
    around = []
    for i in range(3):
        for j in range(3):
            around.append(framed[:, i : i + down, j : j + right])
    return torch.stack(around, dim=3)


def gather_back(sent: Tensor) -> Tensor:
    """Adds up what cells send to their nine neighbours; what goes beyond the edge is lost (`gather_around` transposed).

    Args:
        sent: [B, down, right, 9, D].

    Returns:
        [B, down, right, D].
    """
    down, right = sent.shape[1], sent.shape[2]
    framed = F.pad(sent, [0, 0, 0, 0, 1, 1, 1, 1])
    shifted = []
    for i in range(3):
        for j in range(3):
            shifted.append(framed[:, 2 - i : 2 - i + down, 2 - j : 2 - j + right, 3 * i + j])
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
    batch, down, right, count, _ = cells.shape
    if iterations == 0:
        weights = _own_cell(cells.device).expand(batch, down, right, count, -1)
        return Association(weights, weights.new_full([batch, down, right, 1], float(count)))
    beyond: Tensor | None = None
    if mask_borders:
        beyond = gather_around(cells.new_ones([1, down, right, 1])).transpose(-1, -2) == 0
    weights = _shares(cells, cells.mean(dim=3), beyond)
    mass = gather_back(weights.sum(dim=3).unsqueeze(-1))
    for _ in range(iterations - 1):
        weights = _shares(cells, collect(weights, mass, cells), beyond)
        mass = gather_back(weights.sum(dim=3).unsqueeze(-1))
    return Association(weights, mass)


def _own_cell(device: torch.device, own: int = _OWN, slots: int = SLOTS) -> Tensor:
    """The shares [9] of a token that belongs to its own cell alone; the numbers are arguments for TorchScript."""
    return F.one_hot(torch.full([1], own, device=device, dtype=torch.int64), slots).float()


def _shares(cells: Tensor, supers: Tensor, beyond: Tensor | None) -> Tensor:
    """Softmax over the slots [B, down, right, T, 9], at least float32; `beyond` marks slots that are not there."""
    logits = ((gather_around(supers) * cells.shape[-1] ** -0.5) @ cells.transpose(-1, -2)).transpose(-1, -2)
    if beyond is not None:
        logits = logits.masked_fill(beyond, float("-inf"))
    return logits.softmax(dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
