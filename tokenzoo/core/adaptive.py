"""Merging as many tokens as an image asks for: windows of alike patches, and pairs above a threshold (ALGM).

Norouzi, Orlova, de Geus, Dubbelman, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic
Segmentation with Plain Vision Transformers", CVPR 2024.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import TokenMap, group_map
from .selection import host_ranges
from .tokens import Tokens


class Plan(NamedTuple):
    """How many merges there are, as the images ask for them.

    Attributes:
        counts: merges of each image [B, 1].
        length: tokens after them in the longest image, prefix included.
        uneven: images may be left with different numbers of real tokens.
        merges: some image merges something.
    """

    counts: Tensor
    length: int
    uneven: bool
    merges: bool


def settle(tokens: Tokens, counts: Tensor, removed: int, over_batch: bool) -> Plan:
    """Reads on the host what the images ask for, once.

    Args:
        tokens: the tokens.
        counts: merges that each image asks for [B, 1].
        removed: tokens that one merge removes.
        over_batch: all images merge as often as the one that asks for least.
    """
    if over_batch and counts.shape[0]:
        counts = counts.amin(0, keepdim=True).expand_as(counts)
    real = tokens.valid_patches
    left = (tokens.num_patches if real is None else real.unsqueeze(1)) - counts * removed
    found = host_ranges(left, counts)  # the one look of the host at the data
    (least, most), (_, merges) = found if found is not None else ((tokens.num_patches,) * 2, (0, 0))
    uneven = tokens.valid is not None or least != most
    return Plan(counts, tokens.layout.num_prefix + most, uneven, merges > 0)


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
