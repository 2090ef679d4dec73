"""Which cells of a grid each token of a map belongs to, softly: sums and means of token values per cell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import full_precision
from ..rows import split_dim
from .tiles import EMPTY, Fold, Tiles

# Numbers that working copies may hold at once even where a share of the tokens' own size is less: for all images
# together, or for each image where the batch is not known (traced graphs).
_LEAST, _LEAST_TRACED = 1 << 22, 1 << 18


def budget(x: Tensor, part: int) -> int:
    """Numbers an image that working copies may hold at once: one part-th of its tokens, or what is little anyway."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        least = _LEAST_TRACED
    else:
        least = _LEAST // max(1, x.shape[0])
    return max(x.shape[1] * x.shape[2] // part, least)


class SoftCells(NamedTuple):
    """Soft assignment of every token to the cells around its own.

    Attributes:
        weights: weight of each token of a tile in each cell it sees [B, T, P, S] float32; a token's weights sum to 1.
        tiles: where the tiles are.
    """

    weights: Tensor
    tiles: Tiles

    def sums(self, values: Tensor) -> Tensor:
        """Weighted sums of values [B, N, D] a cell: [B, M, D], at least float32."""
        return self._fold(values, means=False)

    def means(self, values: Tensor) -> Tensor:
        """Weighted means of values [B, N, D] a cell: [B, M, D], at least float32."""
        return self._fold(values, means=True)

    def _fold(self, values: Tensor, means: bool) -> Tensor:
        tiles, wide = self.tiles, self.tiles.columns.tiles
        fold = Fold(tiles)
        with full_precision(values):
            for start, stop in tiles.groups(values.shape[2], budget(values, 2)):
                part = tiles.take_tokens(values, start, stop)
                weights = self.weights[:, start * wide : stop * wide].to(part.dtype)
                fold.add(weights.transpose(2, 3) @ part, weights.sum(2).unsqueeze(-1) if means else None)
        return fold.close()

    def dense_sums(self) -> Tensor:
        """The matrix of `sums` [B, M, N]. For tests and pictures: quadratic."""
        return self.tiles.dense(self.weights)

    def dense_means(self) -> Tensor:
        """The matrix of `means` [B, M, N]."""
        weights = self.dense_sums().double()
        return weights / weights.sum(2, keepdim=True).clamp(min=EMPTY)


class PooledCells(NamedTuple):
    """Assignment of adaptive average pooling: cells may share a token where the grid does not divide the map.

    Attributes:
        rows: 1 where a row of tokens belongs to a row of cells, else 0 [h, H] float32.
        columns: the same for columns [w, W].
        batch: B.
        visible: tokens that count in the means of cells with any such token [B, N] bool; None: all count everywhere.
    """

    rows: Tensor
    columns: Tensor
    batch: int
    visible: Tensor | None = None

    def means(self, values: Tensor) -> Tensor:
        """Mean of values [B, N, D] a cell: [B, M, D], at least float32."""
        if self.visible is None:
            return self._product(values, 1)
        seen = self.visible.unsqueeze(-1).to(values.dtype)
        share = self._product(seen, 1)
        means = self._product(values * seen, 1) / share.clamp(min=EMPTY)
        return torch.where(share > 0, means, self._product(values, 1))

    def any_visible(self) -> Tensor:
        """Cells with a visible token [B, M] bool."""
        return self._product(self.visible.unsqueeze(-1).float(), 1).squeeze(-1) > 0

    def sums(self, values: Tensor) -> Tensor:
        """Sums of values [B, N, D] a cell, a shared token divided up evenly: [B, M, D], at least float32."""
        return self._product(values, 0)

    def _product(self, values: Tensor, normed: int) -> Tensor:
        """Rows, then columns, each matrix summing to one along a dimension."""
        (down, high), wide = self.rows.shape, self.columns.shape[1]
        dtype = torch.promote_types(values.dtype, torch.float32)
        rows, columns = (m.to(dtype) / m.to(dtype).sum(normed, keepdim=True) for m in (self.rows, self.columns))
        step = max(1, budget(values, 2) * down // (3 * values.shape[1] * values.shape[2]))
        parts = []
        with full_precision(values):
            for start in range(0, down, step):
                stop = min(start + step, down)
                first, last = start * high // down, -(-stop * high // down)
                part = split_dim(values[:, first * wide : last * wide].to(dtype), 1, last - first, wide).flatten(2)
                part = split_dim(rows[start:stop, first:last] @ part, 2, wide, -1)  # [B, rows, W, D]
                parts.append(columns @ part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1, 2)

    def dense_means(self) -> Tensor:
        """The matrix of `means` [B, M, N]. For tests and pictures: quadratic."""
        weights = torch.kron(self.rows, self.columns).double().expand(self.batch, -1, -1)
        if self.visible is not None:
            seen = weights * self.visible.unsqueeze(1)
            weights = torch.where(seen.sum(2, keepdim=True) > 0, seen, weights)
        return weights / weights.sum(2, keepdim=True)

    def dense_sums(self) -> Tensor:
        """The matrix of `sums` [B, M, N]."""
        weights = torch.kron(self.rows, self.columns).double()
        return (weights / weights.sum(0, keepdim=True)).expand(self.batch, -1, -1)


def pooled_cells(size: tuple[int, int], grid: tuple[int, int], x: Tensor, visible: Tensor | None = None) -> PooledCells:
    """The cells of average pooling; see `PooledCells` for `visible`."""
    members = []
    for length, cells in zip(size, grid):
        cell = torch.arange(cells, device=x.device).unsqueeze(1)
        first, last = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
        token = torch.arange(length, device=x.device)
        members.append(((token >= first) & (token < last)).float())
    return PooledCells(members[0], members[1], x.shape[0], visible)
