"""Cuts one direction of a token map into tiles, and picks the cut with the least work; Python integers only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TILES = (1, 2, 3, 4, 6, 8)  # cells along one side of a tile that are tried
_MOVE = 24  # copying a number takes as long as about so many multiply-adds


class Axis(NamedTuple):
    """One direction of the map, cut into tiles.

    Attributes:
        homes: cell of every token.
        cells: number of cells.
        tile: cells a tile.
        margin: cells around a tile that its tokens see too; 0 when one tile holds all.
        starts: first token of every tile.
        size: tokens of the largest tile; shorter tiles are padded to it.
        radius: cells that a token sees on either side of its own.
    """

    homes: tuple[int, ...]
    cells: int
    tile: int
    margin: int
    starts: tuple[int, ...]
    size: int
    radius: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.starts)

    @property
    def span(self) -> int:
        """Cells that a tile sees."""
        return self.tile + 2 * self.margin

    @property
    def reach(self) -> int:
        """Further tiles that one tile's cells spill into."""
        return -(-self.span // self.tile) - 1

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of every tile [tiles, size] int64, and which of them are real."""
        starts = torch.tensor(self.starts, device=device).unsqueeze(1)
        ends = torch.tensor((*self.starts[1:], len(self.homes)), device=device).unsqueeze(1)
        index = starts + torch.arange(self.size, device=device)
        return index.clamp(max=len(self.homes) - 1), index < ends

    def centers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cells that every tile sees [tiles, span] int64, and which of them exist."""
        index = torch.arange(self.tiles, device=device).unsqueeze(1) * self.tile - self.margin
        index = index + torch.arange(self.span, device=device)
        return index.clamp(0, self.cells - 1), (index >= 0) & (index < self.cells)


def _axes(length: int, cells: int, radius: int) -> list[Axis]:
    """The ways to cut one direction: tiles of some cells, or one tile of all cells without a margin."""
    homes = home_cells(length, cells)
    first = [homes.index(cell) for cell in range(cells)] + [length]
    ways = [Axis(homes, cells, cells, 0, (0,), length, radius)]
    for tile in _TILES:
        if tile < cells:
            starts = tuple(first[::tile][: -(-cells // tile)])
            ends = (*starts[1:], length)
            largest = max(end - start for start, end in zip(starts, ends))
            ways.append(Axis(homes, cells, tile, radius, starts, largest, radius))
    return ways


def cut(size: tuple[int, int], grid: tuple[int, int], radius: int) -> tuple[Axis, Axis]:
    """The cut into tiles with the least work: products of each tile, and copies of tokens, centres and sums.

    Args:
        size: tokens (high, wide).
        grid: cells (down, right).
        radius: cells that a token sees around its own, in either direction.

    Returns:
        The vertical and the horizontal cut.
    """
    best, least = None, None
    for rows in _axes(size[0], grid[0], radius):
        for columns in _axes(size[1], grid[1], radius):
            tiles = rows.tiles * columns.tiles
            tokens, cells = rows.size * columns.size, rows.span * columns.span
            work = tiles * (2 * tokens * cells + _MOVE * (tokens + 3 * cells))
            if least is None or work < least:
                best, least = (rows, columns), work
    return best


def home_cells(length: int, cells: int) -> tuple[int, ...]:
    """Cell of every token along one direction: nearest upsampling, with its rounding in single precision."""
    scale = _single(cells / length)
    return tuple(min(int(_single(i * scale)), cells - 1) for i in range(length))


def _single(value: float) -> float:
    """Rounds to 24 bits."""
    shifted = value * (2.0**29 + 1)
    return shifted - (shifted - value)
