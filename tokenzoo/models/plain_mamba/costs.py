"""Multiply-adds of PlainMamba by formula.

A linear layer or a convolution counts its multiply-adds. The scan counts, as the authors of Mamba do, 9 operations a
token, inner channel and state channel, and one per token and inner channel for the skip. Published figures count all
four scans of a block; some papers and tools count one: both can be had, and a figure should say which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...ops.layer_macs import conv_macs, linear_macs
from .orders import PATHS

if TYPE_CHECKING:
    from .model import PlainMamba, PlainMambaBlock

_SCAN = 9  # operations per token, inner channel and state channel


def scan_macs(inner: int, d_state: int, tokens: int) -> int:
    """Operations of one selective scan.

    Args:
        inner: channels D.
        d_state: channels N of the state.
        tokens: length L.
    """
    return tokens * inner * (_SCAN * d_state + 1)


def block_macs(
    block: PlainMambaBlock, tokens: int, grid_tokens: int | None = None, directions: int | None = None
) -> int:
    """Multiply-adds of one block for one image.

    Args:
        block: the block.
        tokens: tokens that enter it.
        grid_tokens: tokens of the whole grid, on which convolutions run; None where all are there.
        directions: scans that count, 4 or 1; None for all.

    Raises:
        ValueError: another number of scans, or more tokens than the grid has.
    """
    directions = PATHS if directions is None else directions
    if directions not in (1, PATHS):
        raise ValueError(f"PlainMamba: directions={directions}; count all {PATHS} scans of a block, or 1")
    whole = tokens if grid_tokens is None else grid_tokens
    if tokens > whole:
        raise ValueError(f"PlainMamba: {tokens} tokens cannot be left of a grid of {whole}")
    mixer = block.mamba
    linear = 3 * mixer.dim + mixer.dt_rank + 2 * mixer.d_state + mixer.dt_rank  # a token and inner channel
    convs = [mixer.conv2d] if block.dw is None else [mixer.conv2d, block.dw[0]]
    total = tokens * mixer.d_inner * linear + whole * sum(map(conv_macs, convs))
    return total + directions * scan_macs(mixer.d_inner, mixer.d_state, tokens)


def macs(
    model: PlainMamba, grid: tuple[int, int] | int, kept: Sequence[int] | None = None, directions: int | None = None
) -> int:
    """Multiply-adds of one image.

    Args:
        model: the model.
        grid: tokens (high, wide), or their number.
        kept: tokens that enter each block; None for all.
        directions: scans that count, 4 or 1; None for all.

    Raises:
        ValueError: another number of scans, or counts that do not fit the model.
    """
    length = grid if isinstance(grid, int) else grid[0] * grid[1]
    counts = [length] * len(model.layers) if kept is None else list(kept)
    if len(counts) != len(model.layers):
        raise ValueError(f"PlainMamba: {len(counts)} token counts for {len(model.layers)} blocks; give one per block")
    blocks = sum(block_macs(block, n, length, directions) for block, n in zip(model.layers, counts))
    head = linear_macs(model.head)
    return model.patch_embed.macs((1, length)) + blocks + head * (1 if model.global_pool else counts[-1])
