"""Multiply-adds of SViT by formula: all stages, the way to the grid and back around every depthwise convolution."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.svit.blocks import halved
from ...ops.cells.super_tokens import SLOTS
from ...ops.layer_macs import conv_macs
from ..block import BlockMacs
from ..flow import Flow
from ..grid_costs import count_dropped, to_grid_and_back, way_back
from ..walk import Beside

_KERNEL = 9  # places under a depthwise kernel


def kernel_macs(dim: int, hidden: int, flow: Flow) -> int:
    """Multiply-adds of the depthwise convolutions of a block, which see the whole grid.

    Args:
        dim: channels of the residual stream.
        hidden: channels inside the MLP.
        flow: tokens of the block.
    """
    return _KERNEL * flow.layout.num_patches * (dim + hidden)


def grid_macs(dim: int, hidden: int, flow: Flow) -> int:
    """Multiply-adds of going to the grid and back around both convolutions; see `kernel_macs`."""
    macs = to_grid_and_back(flow.held, dim, dim, flow)  # the positional convolution
    macs += to_grid_and_back(flow.held_inside, dim, hidden, flow) + (flow.mlp_entered - flow.mlp) * hidden
    if flow.recipe is not None and flow.recipe.fill.kind == "stash":  # hidden values of dropped tokens
        macs += sum(count_dropped(*found) for found in flow.held_inside) * dim * hidden
    return macs


def stem_macs(stem: nn.Module) -> int:
    """Multiply-adds of the stem, a place of the first stage."""
    convs = [macs for layer in stem.proj if (macs := conv_macs(layer))]
    return (convs[0] + convs[1]) * 4 + convs[2] + convs[3]


def stage_rows(model: Any, index: int, grid: tuple[int, int]) -> list[Beside]:
    """A whole stage that methods do not see, and the convolution behind it.

    Args:
        model: the model.
        index: the stage.
        grid: places (high, wide) of the first stage.
    """
    grid = stage_grid(grid, index)
    n, stage = grid[0] * grid[1], model.layers[index]
    macs = sum(_super_token_block(block.attn, block.mlp2, grid) for block in stage.blocks)
    return [Beside(f"layers.{index}", n, n, macs + _halving(stage, grid))]


def leaving_rows(model: Any, index: int, flow: Flow) -> list[Beside]:
    """The convolution behind a stage that methods see, and the way back to the grid in front of it."""
    stage, grid = model.layers[index], halved(flow.layout.grid)
    down, dim = _halving(stage, flow.layout.grid), _width(stage.blocks[-1].attn)
    if not down:
        return []
    back = way_back(flow.held_behind, dim, dim, flow)
    return [Beside(f"layers.{index}.downsample", flow.left, grid[0] * grid[1], down + back, back)]


def stage_grid(grid: tuple[int, int], index: int) -> tuple[int, int]:
    """Places of a stage, from those of the first one."""
    for _ in range(index):
        grid = halved(grid)
    return grid


def _halving(stage: nn.Module, grid: tuple[int, int]) -> int:
    """Multiply-adds of the convolution behind a stage; 0 without one."""
    if isinstance(stage.downsample, nn.Identity):
        return 0
    smaller = halved(grid)
    return conv_macs(stage.downsample.proj[0]) * smaller[0] * smaller[1]


def attention_macs(attn: Any, mlp: nn.Module) -> BlockMacs:
    """Multiply-adds of attention among all tokens, and of the MLP's layers, by what they scale with.

    Args:
        attn: a `SuperTokenAttention`.
        mlp: the MLP.
    """
    dim = _width(attn)
    return BlockMacs(2 * dim * dim, dim * dim, 2 * dim, dim * dim, conv_macs(mlp.fc1) + conv_macs(mlp.fc2))


def _super_token_block(attn: Any, mlp: nn.Module, grid: tuple[int, int]) -> int:
    """Multiply-adds of a block that attends among super tokens."""
    macs, dim, places = attention_macs(attn, mlp), _width(attn), grid[0] * grid[1]
    down, right = (-(-length // side) for length, side in zip(grid, attn.stoken_size))
    cells, padded = down * right, down * right * attn.stoken_size[0] * attn.stoken_size[1]
    # nine products a place and channel: to find its shares, to collect, once more to read back
    rounds = (2 * attn.n_iter + 1 if attn.n_iter else 2) * SLOTS * padded * dim
    among = cells * (macs.qk + macs.v + macs.out) + cells * cells * macs.pair
    return rounds + among + places * (macs.mlp + _KERNEL * (dim + mlp.hidden))


def _width(attn: Any) -> int:
    """Channels of a stage."""
    return attn.stoken_refine.num_heads * attn.stoken_refine.head_dim
