"""Merging as many tokens as an image asks for: windows of alike patches, and pairs above a threshold (ALGM).

Norouzi, Orlova, de Geus, Dubbelman, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic
Segmentation with Plain Vision Transformers", CVPR 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps import TokenMap, group_map
from ..ops.rows import split_dim, take_rows
from .selection import raster_order
from .tokens import Layout, Tokens


def window_members(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """Patches of every whole window in raster order [W, n]; rest rows and columns belong to none."""
    (high, wide), (down, right) = grid, window
    index = torch.arange(high * wide, device=device).view(high, wide)
    index = index[: high - high % down, : wide - wide % right]
    return split_dim(split_dim(index, 0, -1, down), 2, -1, right).transpose(1, 2).flatten(2).flatten(0, 1)


def window_similarity(x: Tensor, members: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens in each window [B, W] float32.

    Unit vectors u obey |sum u|^2 = n + sum of all ordered pairs, so no pair is ever formed.

    Args:
        x: tokens [B, M, C].
        members: tokens of every window [B, W, n], the same for all images if B is 1.
    """
    n = members.shape[2]
    rows = members.expand(x.shape[0], -1, -1).flatten(1)
    units = split_dim(take_rows(F.normalize(x.float(), dim=-1), rows), 1, -1, n)
    return (units.sum(2).square().sum(-1) - n) / (n * (n - 1))


def hidden_windows(score: Tensor, visible: Tensor, members: Tensor, first: bool) -> Tensor:
    """Scores of windows [B, W] where a mask hides some patches: mixed ones come last.

    Args:
        score: score of every window [B, W].
        visible: patches that are not hidden [B, M] bool.
        members: patches of every window [B or 1, W, n].
        first: windows that are all hidden come first; else they come last too.
    """
    seen = visible.gather(1, members.expand(score.shape[0], -1, -1).flatten(1)).unflatten(1, members.shape[1:])
    none, every = ~seen.any(2), seen.all(2)
    score = score.masked_fill(~every, torch.finfo(score.dtype).min)
    return score.masked_fill(none, float("inf")) if first else score


def merge_windows(
    tokens: Tokens, members: Tensor, score: Tensor, counts: Tensor, length: int, uneven: bool
) -> TokenMap:
    """Merges the best windows of each image into one token each.

    The new order is [prefix, merged windows by falling score, all other tokens as they stood].

    Args:
        tokens: the tokens.
        members: patches of every window [B, W, n], prefix not counted; the first of them heads the merged token.
        score: score of every window [B, W], -inf for one that must not merge.
        counts: windows that each image merges [B, 1].
        length: tokens after it: of every image, or of the one with the most.
        uneven: whether images may be left with different numbers of real tokens.
    """
    prefix, batch, n = tokens.layout.num_prefix, tokens.x.shape[0], members.shape[2]
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    merges = rank < counts  # [B, W]
    target = torch.where(merges, prefix + rank, -1).unsqueeze(2).expand(-1, -1, n)
    at = members.expand(batch, -1, -1) + prefix
    unset = torch.full((batch, tokens.length), -1, dtype=rank.dtype, device=rank.device)
    assign = unset.scatter(1, at.flatten(1), target.flatten(1))
    first = torch.zeros_like(assign, dtype=torch.bool).scatter(1, at[..., 0], merges)
    rest = (assign < 0) & _real(tokens) & ~_is_prefix(tokens)
    assign = torch.where(rest, prefix + counts + rest.long().cumsum(1) - 1, assign)
    return _grouped(tokens, assign, rest | first, counts * (n - 1), length, uneven, tokens.sizes())


def merge_pairs(
    tokens: Tokens,
    src: Tensor,
    dst: Tensor,
    value: Tensor,
    partner: Tensor,
    counts: Tensor,
    length: int,
    uneven: bool,
    weight: Tensor | None,
    may_receive: Tensor | None = None,
) -> TokenMap:
    """Merges the best sources of each image into their partners, as many as the image says.

    The new order is [prefix, sources that stay (as they stand with a prefix, else by falling score), destinations].

    Args:
        tokens: the tokens.
        src: tokens that may merge [B, S].
        dst: tokens that may receive [B, D].
        value: score of every source [B, S], -inf for padding.
        partner: place of its best destination in `dst` [B, S].
        counts: sources that each image merges [B, 1].
        length: tokens after it: of every image, or of the one with the most.
        uneven: whether images may be left with different numbers of real tokens.
        weight: weight of every token in the means [B, N, 1], or None.
        may_receive: [B, N] bool, where `src` and `dst` overlap: which tokens are destinations, as for
            `strided.best_destination`; None where they do not.
    """
    prefix, real = tokens.layout.num_prefix, _real(tokens)
    sources, targets = (real, real) if may_receive is None else (real & ~may_receive, real & may_receive)
    rank = value.argsort(dim=1, descending=True).argsort(dim=1)
    merges = rank < counts
    stays = sources.gather(1, src) & ~merges
    place = stays.long().cumsum(1) - 1 if prefix else rank - counts
    receives = targets.gather(1, dst)
    dst_slot = torch.where(receives, prefix + stays.sum(1, keepdim=True) + receives.long().cumsum(1) - 1, -1)
    src_slot = torch.where(merges, dst_slot.gather(1, partner), torch.where(stays, prefix + place, -1))
    unset = torch.full((value.shape[0], tokens.length), -1, dtype=rank.dtype, device=rank.device)
    assign = torch.maximum(unset.scatter(1, src, src_slot), unset.scatter(1, dst, dst_slot))
    is_head = real & ~torch.zeros_like(real).scatter(1, src, merges)
    return _grouped(tokens, assign, is_head, counts, length, uneven, weight)


def even_and_odd(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Tokens at even and at odd positions after the prefix [B, E] and [B, O], as `matching.best_odd` counts them."""
    prefix, batch, device = tokens.layout.num_prefix, tokens.x.shape[0], tokens.x.device
    even = torch.arange(prefix + prefix % 2, tokens.length, 2, device=device).expand(batch, -1)
    return even, torch.arange(prefix + 1 - prefix % 2, tokens.length, 2, device=device).expand(batch, -1)


def above_threshold(
    value: Tensor, real: Tensor | None, block: int, over_batch: bool, some_hidden: bool = False
) -> Tensor:
    """How many scores of each image lie at or above mean + standard deviation / block number [B, 1].

    Args:
        value: scores [B, E].
        real: [B, E] bool, False for padding; None without.
        block: number of the block, counted from 1.
        over_batch: one threshold from the averages over the batch, as released; else each image has its own.
        some_hidden: a mask may hide tokens: those score inf and all merge, and those without a visible partner, below
            -2, do not; neither have a part in the threshold.
    """
    real = torch.ones_like(value, dtype=torch.bool) if real is None else real
    hidden = None
    if some_hidden:
        hidden = (real & (value == float("inf"))).sum(1, keepdim=True)
        real = real & (value > -2) & (value < float("inf"))
    count = real.sum(1, keepdim=True)
    seen = torch.where(real, value, 0.0)
    mean = seen.sum(1, keepdim=True) / count.clamp(min=1)
    variance = torch.where(real, (value - mean).square(), 0.0).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    deviation = variance.sqrt()
    if over_batch:
        mean, deviation = mean.mean(0, keepdim=True), deviation.mean(0, keepdim=True)
    above = (real & (value >= mean + deviation / block)).sum(1, keepdim=True)
    # one score alone has no deviation: there is nothing that it could stand out from
    above = torch.where(count > 1, above, 0)
    return above if hidden is None else above + hidden


def raster_members(tokens: Tokens, layout: Layout, window: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Windows as places in the sequence [B or 1, W, n], and which of them hold real tokens only [B, W] (None: all).

    An image that has all its patches has the windows of the grid, whatever its batch mates have lost; any other one has
    stretches of as many patches that follow each other in raster order.

    Args:
        tokens: the tokens, in any order.
        layout: layout of the whole image.
        window: patches of a window (down, right).
    """
    n, device = window[0] * window[1], tokens.x.device
    by_place, whole = raster_order(tokens), tokens.num_patches == layout.num_patches
    windows = window_members(layout.grid, window, device) if whole else None
    if whole and tokens.valid is None:
        return _at(by_place, windows), None
    count = tokens.num_patches // n
    stretches = torch.arange(count * n, device=device).view(count, n)
    members = _at(by_place, stretches)
    if tokens.valid is None:
        return members, None
    left = tokens.valid_patches.unsqueeze(1)
    real = stretches.amax(1) < left if count else torch.zeros_like(left[:, :0], dtype=torch.bool)
    if not whole:
        return members, real
    complete, spare = left == layout.num_patches, count - len(windows)
    is_window = torch.arange(count, device=device) < len(windows)
    windows = _at(by_place, F.pad(windows, (0, 0, 0, spare)))
    return torch.where(complete.unsqueeze(2), windows, members), torch.where(complete, is_window, real)


def _at(by_place: Tensor | None, template: Tensor) -> Tensor:
    """Places in the sequence [B or 1, W, n] of places in raster order [W, n]; None where that is the sequence."""
    if by_place is None:
        return template.unsqueeze(0)
    return split_dim(by_place[:, template.flatten()], 1, *template.shape)


def _real(tokens: Tokens) -> Tensor:
    """[B, N] bool, the tokens that are no padding."""
    if tokens.valid is not None:
        return tokens.valid
    return torch.ones(tokens.x.shape[:2], dtype=torch.bool, device=tokens.x.device)


def _is_prefix(tokens: Tokens) -> Tensor:
    """[1, N] bool, the prefix tokens."""
    return torch.arange(tokens.length, device=tokens.x.device).unsqueeze(0) < tokens.layout.num_prefix


def _grouped(
    tokens: Tokens,
    assign: Tensor,
    is_head: Tensor,
    removed: Tensor,
    length: int,
    uneven: bool,
    weight: Tensor | None,
) -> TokenMap:
    """The map of a grouping of the patches; prefix tokens are put in."""
    prefix, index = _is_prefix(tokens), torch.arange(tokens.length, device=assign.device)
    valid = None
    if uneven:
        left = _real(tokens).sum(1, keepdim=True) - removed
        valid = torch.arange(length, device=assign.device).unsqueeze(0) < left
    return group_map(torch.where(prefix, index, assign), is_head | prefix, length, weight, valid)
