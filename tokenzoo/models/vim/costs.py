"""Multiply-adds of Vision Mamba, by formula.

Published figures (1.45, 5.08 and 18.9 G at 224) count convolution, projections and scan of one direction only; both
directions run. Nine operations a state are what the literature counts for a scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...ops.layer_macs import conv_macs, linear_macs
from .mixer import VimMixer

if TYPE_CHECKING:
    from .model import VisionMamba

_OPS_PER_STATE = 9  # decay, input, update and output of one state at one token
_OPS_PER_CHANNEL = 2  # skip and gate


def mixer_macs(mixer: VimMixer, tokens: int, directions: int | None = None) -> int:
    """Multiply-adds of a mixer for one image.

    Args:
        mixer: the mixer.
        tokens: tokens that enter, class tokens included.
        directions: scan directions to count: 1 as published, None for all that run.

    Raises:
        ValueError: more directions than the mixer has, or none.
    """
    count = mixer.directions if directions is None else directions
    if not 1 <= count <= mixer.directions:
        raise ValueError(f"mixer_macs: directions={directions}; this mixer has {mixer.directions}, count 1 up to that")
    rank, inner = mixer.dt_rank, mixer.d_inner
    drive = conv_macs(mixer.conv1d) + inner * (rank + 2 * mixer.d_state) + rank * inner
    scan = inner * (_OPS_PER_STATE * mixer.d_state + _OPS_PER_CHANNEL)
    drives = count if mixer.bimamba_type == "v2" else 1  # other types share all but the scan
    return tokens * (3 * inner * mixer.dim + drives * drive + count * scan)


def macs(model: VisionMamba, tokens: int | Sequence[int] | None = None, directions: int | None = None) -> int:
    """Multiply-adds of a model for one image of its size.

    Args:
        model: the model.
        tokens: tokens that enter the blocks, class tokens included: one number or one per block; None for all.
        directions: scan directions to count: 1 as published, None for all that run.

    Raises:
        ValueError: a list that is not one number per block, or more directions than a mixer has.
    """
    blocks = list(model.layers)
    if tokens is None:
        tokens = model.patch_embed.num_patches + model.num_class_tokens
    counts = [tokens] * len(blocks) if isinstance(tokens, int) else list(tokens)
    if len(counts) != len(blocks):
        raise ValueError(f"macs: {len(counts)} token counts for {len(blocks)} blocks; give one, or one per block")
    embed = model.patch_embed.macs(model.patch_embed.grid_size)
    return embed + linear_macs(model.head) + sum(mixer_macs(b.mixer, n, directions) for b, n in zip(blocks, counts))
