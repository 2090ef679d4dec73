"""pool: average neighbouring patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.grouping import by_place
from ..core.method import BlockShape, Method, Step
from ..core.options import pair, sides
from ..core.registry import register
from ..core.schedule import Grid, cells_of
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Scans, Traits
from ..maps import MergeMap, TokenMap


@register
@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Averages the patches of each grid cell at chosen blocks: a baseline that looks at nothing but position.

    Where the patches no longer form the full grid (after another reduction), stretches of tokens that follow each
    other in raster order are averaged instead.

    Args:
        stride: patches per cell, (down, right) or one number for both.
        grid: cells (down, right) instead of a stride; cells differ by one patch where the grid does not divide.
        layers: blocks to act in, before attention; by default one, at a quarter of the depth.
    """

    stride: int | tuple[int, int] = pair(2, "both numbers must be at least 1")
    grid: tuple[int, int] | None = pair(None, "both numbers must be at least 1", none=True, both=True)
    prop_attn: bool = False

    name = "pool"
    source = "baseline"
    kind = "merge"
    schedule = Grid(
        layers=lambda depth: (depth // 4,), cells=lambda m, layout: cells_of(sides(m.stride), layout),
        size=lambda m: None if m.grid is None and m.stride == 1 else m.grid or sides(m.stride), instead=("stride",),
    )  # fmt: skip
    traits = Traits(
        place=BEFORE, positions=True, proportional=lambda m: m.prop_attn, mass_pool=True, scans=Scans()
    )

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout = tokens.layout
        cells = step.count(tokens.length, layout)
        groups = by_place(tokens, cells, lambda patches: self.schedule.remaining(patches, step, layout))
        prefix = torch.arange(layout.num_prefix, device=tokens.x.device).expand(tokens.x.shape[0], -1)
        order = torch.cat([prefix, groups.heads + layout.num_prefix], dim=1)
        slots = torch.where(groups.assign >= 0, groups.assign + layout.num_prefix, -1)
        return MergeMap.from_assign(order, torch.cat([prefix, slots], dim=1), tokens.sizes(), groups.valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - n_out) * shape.dim
