"""Choosing tokens by score, with padding and per-image counts handled once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..maps import KeepMap
from ..ops.rows import stable_order
from .method import BlockShape
from .tokens import Layout, Tokens


def own_counts(kept: Callable[[int], int], tokens: Tokens) -> Tensor | None:
    """What `kept` says for the number of real patches of each image [B, 1], None without padding.

    The rule is a plain function of integers, so images are looked up in its table: the same rounding everywhere, and
    the count of an image does not depend on how far its batch is padded.
    """
    return None if tokens.valid is None else own_values(lambda i: (min(kept(i), i),), tokens)


def own_values(rule: Callable[[int], Sequence[int]], tokens: Tokens) -> Tensor:
    """Integers that a rule gives for the number of real patches of each image [B, number of them]; with padding only.

    Args:
        rule: as many integers for every number of patches.
        tokens: the tokens; some are padding.
    """
    real = tokens.valid_patches
    table = torch.tensor([tuple(rule(i)) for i in range(tokens.num_patches + 1)], device=real.device)
    return table[real]


def host_ranges(*counts: Tensor) -> list[tuple[int, int]] | None:
    """Least and largest of counts that depend on the images, in one look of the host; None without images.

    Args:
        counts: integers of every image [B, 1] each.
    """
    if counts[0].shape[0] == 0:
        return None
    ends = torch.stack([end for count in counts for end in count.aminmax()]).tolist()
    return list(zip(ends[::2], ends[1::2]))


def settled_rows(counts: Tensor, tokens: Tokens) -> tuple[int, Tensor | None]:
    """What images ask for, in one look of the host: rows of the longest, and the validity of the rows of all.

    None where no row is padding (as for one image alone): then attention needs no mask from here on.

    Args:
        counts: patches that each image keeps [B, 1].
        tokens: the tokens before.
    """
    found = host_ranges(counts)
    least, most = (tokens.num_patches,) * 2 if found is None else found[0]
    even = tokens.valid is None and least == most
    return most, None if even else real_rows(counts, most, tokens.layout.num_prefix)


def with_prefix(patches: Tensor, num_prefix: int) -> Tensor:
    """Patch numbers [B, K] as token indices with the prefix tokens in front [B, num_prefix + K]."""
    prefix = torch.arange(num_prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([prefix, patches + num_prefix], dim=1)


def groups_with_prefix(assign: Tensor, is_head: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """A grouping of the patches (see `maps.group_map`) [B, M] each as one of all tokens [B, num_prefix + M]."""
    front = torch.arange(num_prefix, device=assign.device).expand(assign.shape[0], -1)
    assign = torch.cat([front, torch.where(assign >= 0, assign + num_prefix, -1)], dim=1)
    return assign, torch.cat([torch.ones_like(front, dtype=torch.bool), is_head], dim=1)


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


def keep_mass(scores: Tensor, tokens: Tokens, share: float, most: int | None) -> KeepMap:
    """Keeps the prefix and, in each image, the fewest patches that hold a share of its scores; one at least.

    Args:
        scores: [B, N], not negative; those of prefix tokens are ignored. Hidden tokens and padding hold nothing.
        tokens: the tokens.
        share: of the sum over the patches of an image, in (0, 1].
        most: patches that an image may keep, which makes the shape static; None looks at the longest image.
    """
    prefix = tokens.layout.num_prefix
    with torch.no_grad():
        patches = scores[:, prefix:].double()
        for real in (tokens.visible, tokens.valid):
            patches = patches if real is None else patches * real[:, prefix:]
        order = ranked(patches, tokens).topk(tokens.num_patches, dim=1).indices
        held = patches.gather(1, order)
        before = held.cumsum(1) - held  # what the better ones hold
        wanted = (before < share * held.sum(1, keepdim=True)) & (held > 0)
        counts = wanted.sum(1, keepdim=True).clamp(min=1)
        if tokens.valid is not None:
            counts = torch.minimum(counts, tokens.valid_patches.unsqueeze(1))
        if most is not None:
            counts = counts.clamp(max=most)
        if most is None:
            length, valid = settled_rows(counts, tokens)
        else:
            length = min(most, tokens.num_patches)
            valid = real_rows(counts, length, prefix)
    return KeepMap(with_prefix(order[:, :length], prefix), tokens.length, valid)


def keep_counts(scores: Tensor, tokens: Tokens, counts: Tensor | None, length: int) -> KeepMap:
    """Keeps the prefix and, in each image, a number of patches with the highest scores, in the order they stand in.

    Of equal scores the first ones stay.

    Args:
        scores: [B, N], those of prefix tokens are ignored; hidden tokens go before visible ones.
        tokens: the tokens.
        counts: patches to keep in each image [B, 1], no more than it has; None keeps `length` in all.
        length: the largest count, which images with fewer are padded to.
    """
    prefix = tokens.layout.num_prefix
    patches = ranked(scores[:, prefix:], tokens)
    own = torch.full_like(patches[:, :1], length, dtype=torch.int64) if counts is None else counts
    least = patches.topk(length, dim=1).values.gather(1, (own - 1).clamp(min=0))
    above, level = patches > least, patches == least  # tokens that merged around a branch have the same score
    picked = above | (level & (level.long().cumsum(1) <= own - above.sum(1, keepdim=True)))
    standing = stable_order(~picked)[:, :length]
    return KeepMap(with_prefix(standing, prefix), tokens.length, real_rows(counts, length, prefix))


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


def importance_macs(n: int, shape: BlockShape, layout: Layout) -> int:
    """Multiply-adds of ranking tokens: one softmax row, or all rows where there is no class token."""
    rows = 1 if layout.has_class else n
    return rows * n * shape.entry
