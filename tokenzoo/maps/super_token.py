"""Super tokens of a grid, and the way back by the same shares."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..ops.cells.super_tokens import Association, from_cells, gather_back, to_cells
from ..ops.rows import split_dim
from .base import TokenMap

_BEYOND = -1


class SuperTokenMap(TokenMap):
    """Averages patches into super tokens, softly over the 3 x 3 cells around each; prefix tokens join as they are.

    Args:
        found: the association of the patches.
        grid: patches (high, wide).
        cell: patches of a cell (high, wide).
        num_prefix: prefix tokens in front.
        known: tokens [B, N, D] and their patches cut into cells already, so that these need not be cut again.
    """

    def __init__(
        self,
        found: Association,
        grid: tuple[int, int],
        cell: tuple[int, int],
        num_prefix: int,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.found, self.grid, self.cell, self.num_prefix, self._known = found, grid, cell, num_prefix, known
        down, right = found.weights.shape[1:3]
        self.n_in, self.n_out = num_prefix + grid[0] * grid[1], num_prefix + down * right
        self.grid_out = (down, right)

    @property
    def _cells(self) -> tuple[int, int]:
        down, right = self.found.weights.shape[1:3]
        return down, right

    def _by_cell(self, x: Tensor) -> Tensor:
        """Patches [B, H * W, D] cut into cells."""
        return to_cells(split_dim(x, 1, *self.grid), self.cell)

    @property
    def heads(self) -> Tensor:
        # the patch in the middle of each cell, or of what the grid has of it
        (down, right), device = self._cells, self.found.weights.device
        rows = self._middles(down, self.cell[0], self.grid[0], device)
        columns = self._middles(right, self.cell[1], self.grid[1], device)
        middle = (rows.unsqueeze(1) * self.grid[1] + columns).flatten() + self.num_prefix
        index = torch.cat([torch.arange(self.num_prefix, device=device), middle])
        return index.expand(self.found.weights.shape[0], -1)

    @staticmethod
    def _middles(count: int, side: int, length: int, device: torch.device) -> Tensor:
        first = torch.arange(count, device=device) * side
        return first + ((length - first).clamp(max=side) - 1) // 2

    @cached_property
    def _nearest(self) -> Tensor:
        """Super token that every patch gives most of its share to [B, H * W]."""
        (down, right), weights = self._cells, self.found.weights
        offset = torch.arange(9, device=weights.device)
        rows = torch.arange(down, device=weights.device).view(-1, 1, 1, 1) + offset // 3 - 1
        columns = torch.arange(right, device=weights.device).view(1, -1, 1, 1) + offset % 3 - 1
        beyond = (rows < 0) | (rows >= down) | (columns < 0) | (columns >= right)
        index = (rows * right + columns).masked_fill(beyond, _BEYOND)
        index = index.expand(weights.shape)
        best = weights.masked_fill(index == _BEYOND, -1.0).argmax(-1, keepdim=True)
        labels = index.gather(-1, best)
        return from_cells(labels, self.grid, self.cell).flatten(1)

    @property
    def assign(self) -> Tensor:
        prefix = torch.arange(self.num_prefix, device=self._nearest.device)
        return torch.cat([prefix.expand(self._nearest.shape[0], -1), self._nearest + self.num_prefix], dim=1)

    def apply(self, x: Tensor) -> Tensor:
        known = self._known is not None and self._known[0] is x
        supers = self.found.collect(self._known[1] if known else self._by_cell(x[:, self.num_prefix :]))
        return torch.cat([x[:, : self.num_prefix], supers.flatten(1, 2)], dim=1)

    def pool(self, mass: Tensor) -> Tensor:
        sent = self.found.weights.to(mass.dtype).transpose(-1, -2) @ self._by_cell(mass[:, self.num_prefix :])
        return torch.cat([mass[:, : self.num_prefix], gather_back(sent).flatten(1, 2)], dim=1)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> None:
        return None  # super tokens have no size: the published layer weighs none of them

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        supers = split_dim(y[:, self.num_prefix :], 1, *self._cells)
        patches = from_cells(self.found.spread(supers), self.grid, self.cell).flatten(1, 2)
        return torch.cat([y[:, : self.num_prefix], patches], dim=1)

    def matrix(self) -> Tensor:
        weights = self.found.weights.double()
        exact = SuperTokenMap(Association(weights, self.found.mass.double()), self.grid, self.cell, self.num_prefix)
        eye = torch.eye(self.n_in, dtype=torch.float64, device=weights.device)
        return exact.apply(eye.expand(weights.shape[0], -1, -1))
