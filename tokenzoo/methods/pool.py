"""pool: average neighbouring patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.options import pair, sides
from ..core.registry import register
from ..core.schedule import Schedule
from ..core.selection import own_counts, raster_order, real_rows
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Scans, Traits
from ..maps import MergeMap, TokenMap
from ..ops.rows import stable_order


@register
@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Averages the patches of each grid cell at chosen blocks: a baseline that looks at nothing but position.

    Where the patches no longer form the full grid (after another reduction), stretches of tokens that follow each
    other in raster order are averaged instead.

    Args:
        stride: patches a cell, (down, right) or one number for both.
        grid: cells (down, right) instead of a stride; cells differ by one patch where the grid does not divide.
        prop_attn: add the log size of a token to its attention logit.
        layers: blocks to act in, before attention; by default one, at a quarter of the depth.
    """

    stride: int | tuple[int, int] = pair(2, "both numbers must be at least 1")
    grid: tuple[int, int] | None = pair(None, "both numbers must be at least 1", none=True, both=True)
    prop_attn: bool = False

    name = "pool"
    source = "baseline"
    kind = "merge"
    schedule = Schedule(layers=lambda depth: (depth // 4,))
    traits = Traits(
        place=BEFORE, positions=True, proportional=lambda m: m.prop_attn, mass_pool=True, scans=Scans()
    )

    def strengths(self, depth: int) -> dict[int, Any]:
        unit = self.grid is None and self.stride == 1
        return {} if unit else {i: self.grid for i in self.resolve_layers(depth)}

    def _cells(self, high: int, wide: int, step: Step) -> tuple[int, int]:
        """Cells (down, right) of a grid of patches."""
        if self.grid is None:
            down, right = sides(self.stride)
            return -(-high // down), -(-wide // right)
        if self.grid[0] > high or self.grid[1] > wide:
            raise step.error(f"grid={self.grid} is larger than the {high} x {wide} patches; give a smaller grid")
        return self.grid

    def _stretches(self, patches: int, layout: Layout) -> int:
        """Tokens that remain of patches that form no grid: the same share as on the grid."""
        high, wide = layout.grid
        cells = self._cells(high, wide, Step(self, -1, None))
        return max(1, -(-patches * cells[0] * cells[1] // (high * wide)))

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        patches = n - layout.num_prefix
        if patches != layout.num_patches:
            return layout.num_prefix + self._stretches(patches, layout)
        down, right = self._cells(*layout.grid, step)
        return layout.num_prefix + down * right

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout, batch = tokens.layout, tokens.x.shape[0]
        if tokens.num_patches != layout.num_patches:
            heads, assign, valid = self._stretch_plan(tokens)
        else:  # an image that has all its patches has the cells of the grid, whatever its batch mates have lost
            heads, assign = _cell_plan(layout.grid, self._cells(*layout.grid, step), tokens.x.device)
            heads, assign, valid = heads.expand(batch, -1), assign.expand(batch, -1), None
            by_place = raster_order(tokens)
            if by_place is not None:
                heads, assign = by_place.gather(1, heads), assign.gather(1, stable_order(by_place))
            if tokens.valid is not None:
                whole = tokens.valid_patches.unsqueeze(1) == layout.num_patches
                own_heads, own_assign, valid = self._stretch_plan(tokens)
                heads, assign = torch.where(whole, heads, own_heads), torch.where(whole, assign, own_assign)
        prefix = torch.arange(layout.num_prefix, device=tokens.x.device).expand(batch, -1)
        order = torch.cat([prefix, heads + layout.num_prefix], dim=1)
        slots = torch.where(assign >= 0, assign + layout.num_prefix, -1)
        return MergeMap.from_assign(order, torch.cat([prefix, slots], dim=1), tokens.sizes(), valid)

    def _stretch_plan(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Heads [B, K], new patch of every patch [B, M] and validity when the patches form no grid."""
        layout, patches = tokens.layout, tokens.num_patches
        rule = lambda n: self._stretches(n, layout)  # noqa: E731
        kept, own = rule(patches), own_counts(rule, tokens)
        raster = tokens.original_positions()[:, layout.num_prefix :]
        count = torch.full_like(raster[:, :1], patches)
        if own is not None:
            real = tokens.valid[:, layout.num_prefix :]
            count, raster = real.sum(1, keepdim=True), torch.where(real, raster, raster.max() + 1)
        own_kept = torch.full_like(count, kept) if own is None else own
        by_place = stable_order(raster)
        rank = by_place.argsort(dim=1)
        stretch = rank * own_kept // count.clamp(min=1)
        assign = torch.where(rank < count, stretch, -1)
        slot = torch.arange(kept, device=raster.device).unsqueeze(0)
        first = -(-slot * count // own_kept.clamp(min=1))
        last = -(-(slot + 1) * count // own_kept.clamp(min=1)) - 1
        middle = (first + last).div(2, rounding_mode="floor").clamp(max=patches - 1)
        # heads of padding rows: any tokens that head nothing else, so that every index appears once
        heads = torch.where(slot < own_kept, by_place.gather(1, middle), -1)
        if own is not None:
            heads = _fill_unused(heads, patches, assign)
        return heads, assign, real_rows(own, kept, layout.num_prefix)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - n_out) * shape.dim

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        high, wide = layout.grid
        ladder = [(high, wide)]
        while ladder[-1] != (1, 1):
            h, w = ladder[-1]
            ladder.append((h - 1, w) if w == 1 or (h > 1 and h * wide > w * high) else (h, w - 1))
        return replace(self, grid=ladder[round(t * (len(ladder) - 1))], stride=2)


def _cell_plan(grid: tuple[int, int], cells: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Head of every cell [1, K] (its middle patch) and cell of every patch [1, M]."""

    def axis(length: int, count: int) -> tuple[Tensor, Tensor]:
        cell = torch.arange(length, device=device) * count // length
        index = torch.arange(count + 1, device=device)
        first = (index * length + count - 1) // count
        return cell, (first[:-1] + first[1:] - 1) // 2

    (rows, row_heads), (columns, column_heads) = axis(grid[0], cells[0]), axis(grid[1], cells[1])
    assign = rows.unsqueeze(1) * cells[1] + columns
    heads = row_heads.unsqueeze(1) * grid[1] + column_heads
    return heads.reshape(1, -1), assign.reshape(1, -1)


def _fill_unused(heads: Tensor, patches: int, assign: Tensor) -> Tensor:
    """Replaces -1 in heads [B, K] by indices of padding patches (assign -1), each used once."""
    missing = heads < 0
    padding = stable_order(assign >= 0)  # padding first
    nth = (missing.long().cumsum(1) - 1).clamp(min=0)
    return torch.where(missing, padding.gather(1, nth), heads)
