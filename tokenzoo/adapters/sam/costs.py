"""Multiply-adds of a SAM block, by formula: windows and relative positions included."""

from __future__ import annotations

from typing import Any

import torch

from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import linear_macs
from ..flow import Acting, Flow


def windows_across(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Windows (down, right) that a map is cut into, those at the border filled up."""
    return -(-grid[0] // window[0]), -(-grid[1] // window[1])


def block_macs(block: Any, flow: Flow) -> int:
    """Multiply-adds of one block for one image, on the full map or on one whose windows were shrunk to some cells."""
    window, attn = flow.layout.grid, block.attn
    across, cells = windows_across(flow.grid, window), _cells(flow.held_inside, flow.layout)
    whole = flow.grid if cells is None else (across[0] * cells[0], across[1] * cells[1])
    windowed, shape = block.window_size > 0, block.shape()
    down, right = (cells or window) if windowed else whole
    attended = across[0] * across[1] * down * right if windowed else whole[0] * whole[1]
    width = shape.num_heads * shape.head_dim
    linear, pair = 4 * shape.dim * width, 2 * width * down * right
    relative = width * (down + right) if attn.use_rel_pos else 0
    return attended * (linear + pair + relative) + whole[0] * whole[1] * linear_macs(block.mlp)


def rebuild_macs(dim: int, flow: Flow) -> int:
    """Multiply-adds of rebuilding the windows that a block leaves whole though nothing in the recipe does it."""
    cells = _cells(flow.held_behind, flow.layout)
    if cells is None or flow.left != flow.layout.num_patches:
        return 0
    across = windows_across(flow.grid, flow.layout.grid)
    return 2 * flow.layout.num_patches * cells[0] * cells[1] * dim * across[0] * across[1]


def _cells(held: tuple[Acting, ...], layout: Layout) -> tuple[int, int] | None:
    """What the reductions in force leave of a window, None if they leave it alone."""
    if not held:
        return None
    step = held[-1][0]
    token_map = step.method.map(Tokens(torch.zeros(1, layout.num_patches, 1), layout, trace=()), None, step)
    return None if token_map is None else token_map.grid_out
