"""fourier: the low frequencies of the grid of rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Selector
from ..functional import fourier
from ..picking import middles
from ..registry import register_selector
from ..rows import NewRows, VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class FourierRows(Selector):
    """Makes rows of the low spatial frequencies of the image, as a smaller grid.

    The smaller grid is the largest one within the budget that stretches one axis at most twice as much as the other; a
    budget that is no such product is not used up. Rows that form no grid are filtered as one line. Rows are mixed in
    front of the projector. Published with training; `rescale` is for models that were not trained with it.

    Args:
        rescale: constants stay as they are; False is the published transform between orthonormal bases, in which they
            grow with the square root of the reduction.

    Source: Wang et al., "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language
    Models", 2025.
    """

    rescale: bool = True

    name = "fourier"
    source = "Wang et al., 2025"
    kind = "merge"
    in_tower_space = True
    data_dependent = True

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> NewRows:
        x, grid = rows.values, rows.grid or (1, rows.length)
        down, across = cells = _cells(grid, keep)
        row, column = middles(grid[0], down), middles(grid[1], across)
        slots = (row[:, None] * grid[1] + column).flatten().to(x.device).expand(x.shape[0], -1)
        return NewRows(fourier(x, grid, cells, self.rescale), slots, in_tower_space=rows.inside)

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return 2 * n * round(keep**0.5) * dim


def _cells(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """The largest grid within the budget whose shape is near that of the image; of equal ones the nearest."""
    high, wide = grid

    def stretch(cells: tuple[int, int]) -> float:
        down, right = high / cells[0], wide / cells[1]
        return max(down, right) / min(down, right)

    pairs = [(down, min(wide, keep // down)) for down in range(1, min(high, keep) + 1)]
    near = [cells for cells in pairs if stretch(cells) <= 2] or [min(pairs, key=stretch)]
    return max(near, key=lambda cells: (cells[0] * cells[1], -stretch(cells)))
