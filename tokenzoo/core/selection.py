"""Choosing tokens by score, with padding and per-image counts handled once for all methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..maps import ChainMap, FuseMap, KeepMap, TokenMap
from ..ops.rows import stable_order
from .method import BlockShape
from .tokens import Layout, Tokens


def own_counts(kept: Callable[[int], int], tokens: Tokens) -> Tensor | None:
    """What `kept` says for the number of real patches of each image [B, 1], None without padding.

    The rule is a plain function of integers, so images are looked up in its table: the same rounding everywhere, and
    the count of an image does not depend on how far its batch is padded.
    """
    real = tokens.valid_patches
    if real is None:
        return None
    table = torch.tensor([min(kept(i), i) for i in range(tokens.num_patches + 1)], device=real.device)
    return table[real].unsqueeze(1)


def host_ranges(*counts: Tensor) -> list[tuple[int, int]] | None:
    """Least and largest of counts that depend on the images, in one look of the host; None without images.

    Args:
        counts: integers of every image [B, 1] each.
    """
    if counts[0].shape[0] == 0:
        return None
    ends = torch.stack([end for count in counts for end in count.aminmax()]).tolist()
    return list(zip(ends[::2], ends[1::2]))


def with_prefix(patches: Tensor, num_prefix: int) -> Tensor:
    """Patch numbers [B, K] as token indices with the prefix tokens in front [B, num_prefix + K]."""
    prefix = torch.arange(num_prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([prefix, patches + num_prefix], dim=1)


def real_rows(counts: Tensor | None, length: int, num_prefix: int) -> Tensor | None:
    """Validity [B, num_prefix + length] of rows that hold `counts` [B, 1] real patches in front."""
    if counts is None:
        return None
    rows = torch.arange(num_prefix + length, device=counts.device)
    return rows.unsqueeze(0) < counts + num_prefix


def keep_best(scores: Tensor, tokens: Tokens, kept: Callable[[int], int]) -> KeepMap:
    """Keeps the prefix and the patches with the highest scores, in falling order of score.

    Args:
        scores: [B, N], those of prefix tokens are ignored.
        tokens: the tokens; hidden ones go before any visible one, and padding is never preferred to a real token.
        kept: patches to keep when there are n of them.
    """
    return keep_patches(scores[:, tokens.layout.num_prefix :], tokens, kept)


def keep_patches(scores: Tensor, tokens: Tokens, kept: Callable[[int], int]) -> KeepMap:
    """`keep_best` by scores of the patches alone [B, M]."""
    prefix, count = tokens.layout.num_prefix, kept(tokens.num_patches)
    best = ranked(scores, tokens).topk(count, dim=1).indices
    valid = real_rows(own_counts(kept, tokens), count, prefix)
    return KeepMap(with_prefix(best, prefix), tokens.length, valid)


def ranked(scores: Tensor, tokens: Tokens) -> Tensor:
    """Scores of the patches [B, M] with those of hidden ones below all others, and padding below these."""
    prefix, patches = tokens.layout.num_prefix, scores.detach()
    if tokens.visible is not None:
        patches = patches.masked_fill(~tokens.visible[:, prefix:], torch.finfo(patches.dtype).min)
    if tokens.valid is not None:
        patches = patches.masked_fill(~tokens.valid[:, prefix:], float("-inf"))
    return patches


def raster_order(tokens: Tokens) -> Tensor | None:
    """Patches by their place in the image [B, M], padding last; None while they stand that way."""
    if tokens.positions is None and tokens.valid is None:
        return None
    prefix = tokens.layout.num_prefix
    place = tokens.original_positions()[:, prefix:]
    if tokens.valid is not None:
        place = torch.where(tokens.valid[:, prefix:], place, prefix + tokens.layout.num_patches)
    return stable_order(place)


def compact(valid: Tensor) -> KeepMap:
    """Moves real rows to the front and padding to the end, keeping the order otherwise: valid [B, N]."""
    order = stable_order(~valid)
    return KeepMap(order, valid.shape[1], valid.gather(1, order))


def mean_of_rest(idx: Tensor, tokens: Tokens, valid: Tensor | None) -> TokenMap:
    """Keeps some tokens and appends the plain mean of all others.

    Args:
        idx: kept tokens, prefix in front [B, K].
        tokens: the tokens.
        valid: [B, K] bool where images keep different numbers, else None.
    """
    left_out = KeepMap(idx, tokens.length, valid).assign < 0
    if tokens.valid is not None:
        left_out = left_out & tokens.valid
    counts = left_out if tokens.visible is None else left_out & tokens.visible
    weight = counts / counts.sum(1, keepdim=True).clamp(min=1)
    if valid is None:
        return FuseMap(idx, weight, left_out)
    # an image that leaves nothing out gets no mean
    real = torch.cat([valid, left_out.any(dim=1, keepdim=True)], dim=1)
    return ChainMap(FuseMap(idx, weight, left_out, real), compact(real))


def importance_macs(n: int, shape: BlockShape, layout: Layout) -> int:
    """Multiply-adds of ranking tokens: one softmax row, or all rows where there is no class token."""
    rows = 1 if layout.has_class else n
    return rows * n * shape.num_heads * shape.head_dim
