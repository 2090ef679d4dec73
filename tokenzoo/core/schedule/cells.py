"""One token per cell of the grid of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..step import Step
from ..tokens import Layout, Tokens
from .base import Schedule


def cells_of(cell: tuple[int, int], layout: Layout) -> tuple[int, int]:
    """Cells (down, right) of a size (down, right) that cover a grid, the last ones perhaps incomplete."""
    return -(-layout.grid[0] // cell[0]), -(-layout.grid[1] // cell[1])


def scaled_cells(share: float, layout: Layout) -> tuple[int, int]:
    """Cells (down, right) that are a share of the patches along each axis, rounded, at least one."""
    return tuple(max(1, round(side * share)) for side in layout.grid)


@dataclass(frozen=True)
class Cells(Schedule):
    """Cells that cover the grid; the strength of a block is what `size` says.

    Args:
        cells: cells (down, right) of a method on a layout.
        size: what the options say of the cells, None for cells of one patch, which change nothing.
        remedy: what to do where the patches no longer form their full grid. Empty where stretches of patches that
            follow each other take the place of cells: as many as leave the same share.
    """

    cells: Callable[[Any, Layout], tuple[int, int]] = lambda method, layout: layout.grid
    size: Callable[[Any], Any] = lambda method: None
    remedy: str = ""

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, Any]:
        size = self.size(method)
        return {} if size is None else dict.fromkeys(layers, size)

    def count(self, n: int, step: Step, layout: Layout) -> tuple[int, int]:
        """Cells (down, right) of the full grid."""
        return self.cells(step.method, layout)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        patches, (high, wide) = n - layout.num_prefix, layout.grid
        if patches != layout.num_patches and self.remedy:
            raise step.error(
                f"needs all {high} x {wide} patches in their grid, but {patches} tokens are left of it; {self.remedy}"
            )
        return layout.num_prefix + self.remaining(patches, step, layout)

    def remaining(self, patches: int, step: Step, layout: Layout) -> int:
        """Tokens that are left of patches: the cells of a full grid, else the same share."""
        down, right = self.count(layout.num_prefix + patches, step, layout)
        if patches == layout.num_patches:
            return down * right
        return max(1, -(-patches * down * right // layout.num_patches))

    def of(self, tokens: Tokens, step: Step) -> tuple[int, int]:
        """Cells (down, right) for tokens that have to be all patches in their places."""
        step.tokens_out(tokens.length, tokens.layout)  # grids of other images than the model's own
        if tokens.positions is not None:  # as many tokens as patches, but not one each
            raise step.error(f"needs all patches in their grid, but tokens were reduced before; {self.remedy}")
        return step.count(tokens.length, tokens.layout)


@dataclass(frozen=True)
class Grid(Cells):
    """The same where an option `grid` may say how many cells there are.

    Args:
        instead: options that say it while `grid` is None; they go back to their defaults when the grid is solved for.
    """

    instead: tuple[str, ...] = ()

    def count(self, n: int, step: Step, layout: Layout) -> tuple[int, int]:
        grid, (high, wide) = step.method.grid, layout.grid
        if grid is None:
            return self.cells(step.method, layout)
        if grid[0] > high or grid[1] > wide:
            raise step.error(f"grid={grid} is larger than the {high} x {wide} patches; give a smaller grid")
        return grid

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        high, wide = layout.grid
        ladder = [(high, wide)]
        while ladder[-1] != (1, 1):
            h, w = ladder[-1]
            ladder.append((h - 1, w) if w == 1 or (h > 1 and h * wide > w * high) else (h, w - 1))
        defaults = {name: method.options()[name] for name in self.instead}
        return {"grid": ladder[round(t * (len(ladder) - 1))], **defaults}
