"""pool: means of neighbouring rows, the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...maps import MergeMap
from ..base import Selector
from ..picking import even_rows, middles
from ..registry import register_selector
from ..rows import VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class PoolRows(Selector):
    """Averages rows of the language model over cells of the grid, or over stretches where they form no grid.

    The grid is cut into as many cells as rows have to stay, `down` x `across` of them with the shape nearest to that of
    the image; where no two whole numbers make the count, into stretches of the order in which rows stand. A mean takes
    the place of the row in the middle of its cell.

    Source: the baseline of all papers here.
    """

    name = "pool"
    source = "baseline"
    kind = "merge"

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> MergeMap:
        n, batch, device = rows.length, rows.x.shape[0], rows.x.device
        cells = None if rows.grid is None else _cells(rows.grid, keep)
        if cells is None:
            index = torch.arange(n)
            assign = (index * keep).div(n, rounding_mode="floor")
            order = even_rows(n, keep, 1, torch.device("cpu"))[0]
        else:
            (high, wide), (down, across) = rows.grid, cells
            index = torch.arange(n).view(high, wide)
            row = (torch.arange(high) * down).div(high, rounding_mode="floor")
            column = (torch.arange(wide) * across).div(wide, rounding_mode="floor")
            assign = (row[:, None] * across + column).flatten()
            order = index[middles(high, down)][:, middles(wide, across)].flatten()
        expand = (each.to(device).expand(batch, -1) for each in (order, assign))
        return MergeMap.from_assign(*expand)


def _cells(grid: tuple[int, int], keep: int) -> tuple[int, int] | None:
    """Cells (down, across) of the shape nearest to that of the grid; None where the count has no such factors."""
    high, wide = grid
    pairs = [(d, keep // d) for d in range(1, keep + 1) if keep % d == 0 and d <= high and keep // d <= wide]
    if not pairs:
        return None
    down, across = min(pairs, key=lambda pair: abs(pair[0] * wide - pair[1] * high))
    even = max(high / down, wide / across) <= 4 * min(high / down, wide / across)
    return (down, across) if even else None
