"""Kept tokens and one token that stands for all that are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps import ChainMap, FuseMap, KeepMap, TokenMap
from .selection import compact
from .tokens import Tokens


def left_out(keep: KeepMap, tokens: Tokens) -> Tensor:
    """Real tokens that are not kept [B, N] bool."""
    gone = keep.assign < 0
    return gone if tokens.valid is None else gone & tokens.valid


def mean_of_rest(keep: KeepMap, tokens: Tokens) -> TokenMap:
    """Kept tokens, and the plain mean of all others that no mask hides."""
    gone = left_out(keep, tokens)
    counts = gone if tokens.visible is None else gone & tokens.visible
    return fuse(keep, counts / counts.sum(1, keepdim=True).clamp(min=1), gone)


def fuse(keep: KeepMap, weight: Tensor, gone: Tensor) -> TokenMap:
    """Kept tokens, and one weighted sum of those left out behind them.

    Args:
        keep: what is kept.
        weight: weight of every token in the sum [B, N], 0 for those that are kept.
        gone: tokens that the sum stands for [B, N] bool. An image that leaves none out gets no token more.
    """
    if keep.valid is None:
        return FuseMap(keep.idx, weight, gone)
    valid = torch.cat([keep.valid, gone.any(dim=1, keepdim=True)], dim=1)
    return ChainMap(FuseMap(keep.idx, weight, gone, valid), compact(valid))
