"""Super token attention on the weights of ordinary attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..core.method import BlockShape, Method, Step
from ..core.options import number, pair, sides
from ..core.registry import register
from ..core.schedule import Cells, cells_of
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..maps import SuperTokenMap, TokenMap
from ..ops.attention import full_precision
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
        cell: patches per cell, (high, wide) or one number for both.
        iterations: rounds of assigning and averaging; 0 keeps every patch in its own cell.
        mask_borders: cells at the edge of the grid lose no weight to neighbours that are not there.
        layers: blocks to act in; by default the first half, where tokens are alike.

    Source: Huang, Zhou, Cao, He, Tan, "Vision Transformer with Super Token Sampling", CVPR 2023; the use in plain ViTs
    is ours.
    """

    cell: int | tuple[int, int] = pair(4, "1 is plain attention, 4 a common size", fault="holds no patch")
    iterations: int = number(1, "give whole rounds; 0 keeps every patch in its own cell", least=0, whole=True)
    mask_borders: bool = False

    name = "sta"
    source = "Huang et al., CVPR 2023"
    kind = "attention"
    schedule = Cells(
        layers=lambda depth: range((depth + 1) // 2), cells=lambda m, layout: cells_of(sides(m.cell), layout),
        size=lambda m: None if m.cell == 1 else sides(m.cell),
        remedy="let it act in earlier blocks than methods that reduce tokens",
    )  # fmt: skip
    traits = Traits(place=around("attention", replaces_attention=True), positions=True)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        left, (high, wide), (down, right) = super().tokens_out(n, step, layout), layout.grid, sides(self.cell)
        if down > high or right > wide:
            raise step.error(
                f"a cell of {down} x {right} is larger than the {high} x {wide} patches; use a smaller cell or larger "
                "images"
            )
        return left

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout = tokens.layout
        self.schedule.of(tokens, step)
        z = signals.branch_input
        cells = to_cells(split_dim(z[:, layout.num_prefix :], 1, *layout.grid), sides(self.cell))
        with full_precision(cells):
            found = associate(cells, self.iterations, self.mask_borders)
        return SuperTokenMap(found, layout.grid, sides(self.cell), layout.num_prefix, known=(z, cells))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        padded = math.prod((*cells_of(sides(self.cell), layout), *sides(self.cell)))
        # nine products per patch and channel: to find its shares, to collect, once more to read back
        return (2 * self.iterations + 1 if self.iterations else 2) * SLOTS * padded * shape.dim

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        # cells of one size, in more blocks from the first on
        count = round(t * depth)
        return replace(self, layers=tuple(range(count))) if count else replace(self, cell=1)
