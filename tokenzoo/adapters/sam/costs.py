"""Multiply-adds of a SAM image encoder, by formula: windows, relative positions and the neck included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ...core.method import BlockShape, Step
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..vit.attention import input_width


class SamBlockCost(NamedTuple):
    """What the formulas need of one block.

    Attributes:
        windowed: attends inside windows.
        shape: widths.
        attention: multiply-adds of projections a token.
        mlp: multiply-adds of the MLP a token.
        relative: adds relative positions.
        fused: runs on the fused kernel.
    """

    windowed: bool
    shape: BlockShape
    attention: int
    mlp: int
    relative: bool
    fused: bool


class SamCosts(NamedTuple):
    """Everything about a model that counting needs, read once.

    Attributes:
        blocks: the blocks.
        grid: tokens (high, wide) of the map.
        embed: multiply-adds of the patch embedding.
        head: multiply-adds of neck and head.
    """

    blocks: tuple[SamBlockCost, ...]
    grid: tuple[int, int]
    embed: int
    head: int

    def rows(self, recipe: Recipe | None, layout: Layout) -> list[tuple[str, str, int, int, int, int, str]]:
        """Name, methods, tokens in and out, multiply-adds, those of reduction, and attention path of every row.

        Args:
            recipe: None for the unpatched model.
            layout: one window.
        """
        depth = len(self.blocks)
        counts = recipe.token_counts(depth, layout) if recipe is not None else [[] for _ in range(depth)]
        across = tuple(-(-length // side) for length, side in zip(self.grid, layout.grid))
        cells: tuple[int, int] | None = None  # tokens (down, right) of a shrunken window
        tokens = self.grid[0] * self.grid[1]
        rows = [("embed", "", tokens, tokens, self.embed, 0, "")]
        for index, (block, steps) in enumerate(zip(self.blocks, counts)):
            before, reduction = _tokens(self.grid, across, cells), 0
            macs = 0
            for place in ("before", "", "after", "norm"):
                if not place:
                    macs = self._block(block, across, layout.grid, cells)
                for step, n, n_out in steps:
                    if step.method.place == place:
                        reduction += step.method.macs(n, n_out, block.shape, layout, step) * across[0] * across[1]
                        cells = _cells(step, layout) if step.method.opens_span else None
            if index == depth - 1 and cells is not None:  # windows are rebuilt after the last block at the latest
                pairs = layout.num_patches * cells[0] * cells[1]
                reduction += 2 * pairs * block.shape.dim * across[0] * across[1]
                cells = None
            names = ", ".join(step.method.name for step, _, _ in steps)
            after = _tokens(self.grid, across, cells)
            path = "fused" if block.fused else "unfused"
            rows.append((f"blocks.{index}", names, before, after, macs + reduction, reduction, path))
        rows.append(("head", "", tokens, tokens, self.head, 0, ""))
        return rows

    def _block(
        self,
        block: SamBlockCost,
        across: tuple[int, int],
        window: tuple[int, int],
        cells: tuple[int, int] | None,
    ) -> int:
        """Multiply-adds of one block on the full map, or on one whose windows were shrunk to some cells."""
        whole = self.grid if cells is None else (across[0] * cells[0], across[1] * cells[1])
        down, right = (cells or window) if block.windowed else whole
        attended = across[0] * across[1] * down * right if block.windowed else whole[0] * whole[1]
        pair = 2 * block.shape.num_heads * block.shape.head_dim * down * right
        relative = block.shape.num_heads * block.shape.head_dim * (down + right) if block.relative else 0
        return attended * (block.attention + pair + relative) + whole[0] * whole[1] * block.mlp


def _tokens(grid: tuple[int, int], across: tuple[int, int], cells: tuple[int, int] | None) -> int:
    """Tokens of the map, padding of border windows included once these were shrunk."""
    return grid[0] * grid[1] if cells is None else across[0] * cells[0] * across[1] * cells[1]


def _cells(step: Step, layout: Layout) -> tuple[int, int] | None:
    """What a step leaves of a window, None if it leaves it alone."""
    token_map = step.method.map(Tokens(torch.zeros(1, layout.num_patches, 1), layout, trace=()), None, step)
    return None if token_map is None else token_map.grid


def read_sam_costs(model: nn.Module, grid: tuple[int, int]) -> SamCosts:
    """Reads what the formulas need off a model, patched or not.

    Args:
        model: the model.
        grid: tokens (high, wide) of the map.
    """
    blocks = []
    for block in model.blocks:
        attn = block.attn
        shape = BlockShape(input_width(attn), attn.num_heads, attn.head_dim)
        linear = 4 * shape.dim * attn.num_heads * attn.head_dim, linear_macs(block.mlp)
        blocks.append(SamBlockCost(block.window_size > 0, shape, *linear, attn.use_rel_pos, attn.fused_attn))
    tokens = grid[0] * grid[1]
    neck = conv_macs(model.neck)
    embed = conv_macs(model.patch_embed.proj) * tokens
    head = linear_macs(model.head)
    head *= tokens if model.global_pool == "" else 1
    return SamCosts(tuple(blocks), tuple(grid), embed, neck * tokens + head)
