"""What goes from one stage of SViT to the next, and what comes out behind the last."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.tokens import Tokens
from ..pooling import pool_plain


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
