"""Cuts a token map into tiles so that each token meets the centres of neighbouring cells only.

Every token belongs to one cell of a coarse grid, and both are separable in rows and columns. A tile is a rectangle of
cells: its tokens form a rectangle of the map and see the tile's cells and a margin around them. All sizes are Python
integers, so that everything here is known before a model runs; sums over tiles are put together by shifted additions,
in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import split_dim
from .axis import Axis, cut

EMPTY = 1e-16  # a centre whose weights sum to less than this becomes (nearly) zero, as released


class Tiles(NamedTuple):
    """A map of tokens and its grid of cells, cut into tiles.

    Attributes:
        rows: the vertical direction.
        columns: the horizontal direction.
        tokens: tokens of each tile by row of tiles [Th, Tw * P] int64; padding repeats some token.
        centers: cells that each tile sees by row of tiles [Th, Tw * S] int64.
        allowed: which of its cells a token may use [Th, Tw, P, S] bool; none for padding.
    """

    rows: Axis
    columns: Axis
    tokens: Tensor
    centers: Tensor
    allowed: Tensor

    @property
    def cells(self) -> int:
        """M, cells of the grid."""
        return self.rows.cells * self.columns.cells

    def groups(self, numbers: int, budget: int) -> list[tuple[int, int]]:
        """(start, stop) of rows of tiles to be worked on at once.

        Args:
            numbers: values that one token or centre has.
            budget: values per image that the copies of tokens and centres may hold.
        """
        strip = numbers * (self.tokens.shape[1] + 2 * self.centers.shape[1])
        step = max(1, budget // strip)
        return [(start, min(start + step, self.rows.tiles)) for start in range(0, self.rows.tiles, step)]

    def take_tokens(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows of x [B, N, D] by tile, at least in float32: [B, (stop - start) * Tw, P, D]."""
        return self._take(x, self.tokens[start:stop])

    def take_centers(self, c: Tensor, start: int, stop: int) -> Tensor:
        """Rows of c [B, M, D] that each tile sees: [B, (stop - start) * Tw, S, D]."""
        return self._take(c, self.centers[start:stop])

    def _take(self, x: Tensor, index: Tensor) -> Tensor:
        taken = x.index_select(1, index.reshape(-1))
        taken = taken.to(torch.promote_types(x.dtype, torch.float32))
        return split_dim(taken, 1, index.shape[0] * self.columns.tiles, -1)

    def fold(self, part: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Adds up what the tiles of some rows of tiles have for each cell.

        Args:
            part: sums of each tile for the cells it sees [B, n * Tw, S, D].
            carry: what the rows of tiles above left for cells of these; None at the top.

        Returns:
            Sums of the finished rows of cells [B, rows, columns, D], and what is left for the rows below.
        """
        down, right = self.rows, self.columns
        part = split_dim(split_dim(part, 2, down.span, right.span), 1, -1, right.tiles).transpose(2, 3)
        strips = part.shape[1]
        total = None if carry is None else F.pad(carry, (0, 0, 0, 0, 0, 0, 0, 0, 0, strips))
        for i in range(down.reach + 1):
            for j in range(right.reach + 1):
                piece = part[:, :, i * down.tile : (i + 1) * down.tile, :, j * right.tile : (j + 1) * right.tile]
                pads = (0, right.tile - piece.shape[4], j, right.reach - j)
                pads = (*pads, 0, down.tile - piece.shape[2], i, down.reach - i)
                piece = F.pad(piece, (0, 0, *pads)) if any(pads) else piece
                total = piece if total is None else total + piece
        return total[:, :strips], total[:, strips:] if down.reach else None

    def dense(self, weights: Tensor) -> Tensor:
        """Writes weights of every tile [B, T, P, S] out as a matrix [B, M, N]. For tests and pictures: quadratic."""
        count = len(self.rows.homes) * len(self.columns.homes)
        place = self.centers.reshape(-1, 1, weights.shape[3]) * count + self.tokens.reshape(-1, weights.shape[2], 1)
        out = torch.zeros(weights.shape[0], self.cells * count, dtype=weights.dtype, device=weights.device)
        out = out.index_add(1, place.reshape(-1), weights.flatten(1))
        return split_dim(out, 1, self.cells, count)


class Fold:
    """Adds up what the tiles have for each cell, some rows of tiles at a time from top to bottom.

    Args:
        tiles: the tiles.
    """

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.done: list[Tensor] = []
        self.carry: Tensor | None = None
        self.mass_carry: Tensor | None = None

    def add(self, part: Tensor, mass: Tensor | None = None) -> None:
        """Takes the next rows of tiles.

        Args:
            part: sums of each tile for the cells it sees [B, n * Tw, S, D].
            mass: what to divide by [B, n * Tw, S, 1], summed up the same way; None leaves sums.
        """
        total, self.carry = self.tiles.fold(part, self.carry)
        if mass is not None:
            mass, self.mass_carry = self.tiles.fold(mass, self.mass_carry)
        self._finish(total, mass)

    def _finish(self, total: Tensor, mass: Tensor | None) -> None:
        right = self.tiles.columns
        total = total.flatten(3, 4)[:, :, :, right.margin : right.margin + right.cells]
        if mass is not None:
            mass = mass.flatten(3, 4)[:, :, :, right.margin : right.margin + right.cells]
            total = total / mass.clamp(min=EMPTY)
        self.done.append(total.flatten(1, 2))

    def close(self) -> Tensor:
        """Sums or means of all cells [B, M, D]."""
        if self.carry is not None:
            self._finish(self.carry, self.mass_carry)
        down = self.tiles.rows
        total = self.done[0] if len(self.done) == 1 else torch.cat(self.done, dim=1)
        return total[:, down.margin : down.margin + down.cells].flatten(1, 2)


def make_tiles(size: tuple[int, int], grid: tuple[int, int], radius: int, x: Tensor) -> Tiles:
    """The tiles of a map, remembered by sizes and device.

    Args:
        size: tokens (high, wide).
        grid: cells (down, right).
        radius: cells that a token sees around its own, in either direction.
        x: a tensor on the device where the tiles are needed.
    """
    # tensors made while a graph is traced belong to that trace: they must not be remembered
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return _build(size, grid, radius, x.device)
    return _remembered(size, grid, radius, x.device)


@lru_cache(maxsize=32)
def _remembered(size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device) -> Tiles:
    with torch.inference_mode(False):  # a later call may train
        return _build(size, grid, radius, device)


def _build(size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device) -> Tiles:
    rows, columns = cut(size, grid, radius)
    row, row_real = rows.tokens(device)
    column, column_real = columns.tokens(device)
    tokens = row[:, None, :, None] * size[1] + column[None, :, None, :]  # [Th, Tw, Ph, Pw]
    cell_row, row_exists = rows.centers(device)
    cell_column, column_exists = columns.centers(device)
    centers = cell_row[:, None, :, None] * grid[1] + cell_column[None, :, None, :]  # [Th, Tw, Sh, Sw]
    down = _near(rows, row, cell_row) & row_real.unsqueeze(2) & row_exists.unsqueeze(1)  # [Th, Ph, Sh]
    right = _near(columns, column, cell_column) & column_real.unsqueeze(2) & column_exists.unsqueeze(1)
    allowed = down[:, None, :, None, :, None] & right[None, :, None, :, None, :]  # [Th, Tw, Ph, Pw, Sh, Sw]
    return Tiles(rows, columns, tokens.flatten(1), centers.flatten(1), allowed.flatten(4, 5).flatten(2, 3))


def _near(axis: Axis, tokens: Tensor, centers: Tensor) -> Tensor:
    """Whether a cell lies within the radius of a token's own [tiles, size, span]."""
    home = torch.tensor(axis.homes, device=tokens.device)[tokens]
    return (home.unsqueeze(2) - centers.unsqueeze(1)).abs() <= axis.radius
