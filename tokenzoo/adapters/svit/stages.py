"""What goes from one stage of SViT to the next, and what comes out behind the last."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.tokens import Tokens
from ...maps import RestoreMap
from ..pooling import pool_plain
from .blocks import from_map, to_map


class Taps(NamedTuple):
    """Of a pass whose maps are wanted: the context that `start` and `restart` fill.

    Attributes:
        maps: map that left the blocks of every stage that has ended.
        last: stage that the pass stops behind.
    """

    maps: dict[int, Tensor]
    last: int


def pooled_by(tokens: Tokens, kind: str, mass_weighted: bool) -> Tensor:
    """timm's pooling of maps [B, D] on tokens."""
    kind = kind.removeprefix("fast")
    if kind == "catavgmax":
        return torch.cat([pool_plain(tokens, part, True, mass_weighted) for part in ("avg", "max")], dim=1)
    return pool_plain(tokens, kind or "avg", True, mass_weighted)


def carried(scores: Tensor | None, tokens: Tokens, grid: tuple[int, int]) -> Tensor | None:
    """An importance of tokens [B, N] that is carried along, for the next stage: summed over its places."""
    if scores is None:
        return None
    scores, old = scores.unsqueeze(-1), tokens.layout.grid
    if tokens.trace:  # the importance of a token is shared out among the places it stands for
        maps = tuple(step.map for step in tokens.trace)
        scores = RestoreMap(0, maps, (None,) * len(maps)).pool(scores)
    means = F.adaptive_avg_pool2d(to_map(scores, old), grid)
    return from_map(means).squeeze(-1) * (old[0] * old[1] / (grid[0] * grid[1]))
