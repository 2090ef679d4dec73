"""Super token attention on the weights of ordinary attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core.method import BlockShape, Method, Step
from ..core.registry import register
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..maps import SuperTokenMap, TokenMap
from ..ops.cells.super_tokens import SLOTS, associate, to_cells
from ..ops.rows import split_dim


@register
@dataclass(frozen=True, kw_only=True)
class STA(Method):
    """Attends among super tokens, soft averages over cells of the grid, which all patches read back by the same shares.

    The block's own projections serve super tokens, prefix tokens join them, and the sequence keeps its length: every
    head, dense or not, works as before. Cells of one patch are plain attention. Weights that were not trained with it
    lose accuracy, since values are averages over cells; the paper trains from scratch. The published layer loses some
    weight beyond the edge of the grid and to the zeros that fill up incomplete cells; `mask_borders` avoids the former.

    Args:
        cell: patches of a cell, (high, wide) or one number for both.
        iterations: rounds of assigning and averaging; 0 keeps every patch in its own cell.
        mask_borders: cells at the edge of the grid lose no weight to neighbours that are not there.
        layers: blocks to act in; by default the first half, where tokens are alike.

    Source: Huang, Zhou, Cao, He, Tan, "Vision Transformer with Super Token Sampling", CVPR 2023; the use in plain ViTs
    is ours.
    """

    cell: int | tuple[int, int] = 4
    iterations: int = 1
    mask_borders: bool = False

    name: ClassVar[str] = "sta"
    source: ClassVar[str] = "Huang et al., CVPR 2023"
    kind: ClassVar[str] = "attention"
    uses_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        cell = (self.cell, self.cell) if type(self.cell) is int else self.cell
        if not isinstance(cell, (tuple, list)) or len(cell) != 2 or any(type(side) is not int for side in cell):
            raise TypeError(f"sta: cell={self.cell!r}; give one whole number or two (high, wide), such as 4")
        if min(cell) < 1:
            raise ValueError(f"sta: cell={self.cell!r} holds no patch; 1 is plain attention, 4 a common size")
        object.__setattr__(self, "cell", cell[0] if cell[0] == cell[1] else tuple(cell))
        if type(self.iterations) is not int:
            raise TypeError(f"sta: iterations={self.iterations!r}; give a whole number of rounds")
        if self.iterations < 0:
            raise ValueError(f"sta: iterations={self.iterations} is negative; 0 keeps every patch in its own cell")
        if not isinstance(self.mask_borders, bool):
            raise TypeError(f"sta: mask_borders={self.mask_borders!r}; give True or False")

    @property
    def place(self) -> str:
        return "around"

    @property
    def branches(self) -> tuple[str, ...]:
        return ("attention",)

    @property
    def replaces_attention(self) -> bool:
        return True

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.cell, self.cell) if isinstance(self.cell, int) else self.cell

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range((depth + 1) // 2))

    def strengths(self, depth: int) -> dict[int, tuple[int, int]]:
        layers = self.resolve_layers(depth)
        return {i: self._sides for i in layers} if self._sides != (1, 1) else {}

    # ---- counts

    def _cells(self, layout: Layout) -> int:
        """Super tokens of a full grid."""
        high, wide = self._sides
        return -(-layout.grid[0] // high) * -(-layout.grid[1] // wide)

    def tokens_inside(self, n: int, step: Step, layout: Layout) -> int:
        grid = f"{layout.grid[0]} x {layout.grid[1]}"
        if n - layout.num_prefix != layout.num_patches:
            raise step.error(
                f"needs all {grid} patches in their grid, but {n - layout.num_prefix} tokens are left of it; let it "
                "act in earlier blocks than methods that reduce tokens"
            )
        if self._sides[0] > layout.grid[0] or self._sides[1] > layout.grid[1]:
            raise step.error(
                f"a cell of {self._sides[0]} x {self._sides[1]} is larger than the {grid} patches; use a smaller cell "
                "or larger images"
            )
        return layout.num_prefix + self._cells(layout)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        self.tokens_inside(n, step, layout)  # refuses what cannot be reached
        return n

    # ---- the map

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout = tokens.layout
        self.tokens_inside(tokens.length, step, layout)
        if tokens.positions is not None:  # as many tokens as patches, but not one each
            raise step.error(
                "needs all patches in their grid, but tokens were reduced before; let it act in earlier blocks"
            )
        z = signals.branch_input
        cells = to_cells(split_dim(z[:, layout.num_prefix :], 1, *layout.grid), self._sides)
        found = associate(cells, self.iterations, self.mask_borders)
        return SuperTokenMap(found, layout.grid, self._sides, layout.num_prefix, known=(z, cells))

    # ---- cost and strength

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        padded = self._cells(layout) * self._sides[0] * self._sides[1]
        # nine products a patch and channel: to find its shares, to collect, once more to read back
        return (2 * self.iterations + 1 if self.iterations else 2) * SLOTS * padded * shape.dim

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        # cells of one size, in more blocks from the first on
        count = round(t * depth)
        return replace(self, layers=tuple(range(count))) if count else replace(self, cell=1)
