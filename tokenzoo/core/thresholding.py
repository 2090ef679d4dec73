"""Merging and pruning by thresholds: which tokens go, as gates with gradient and as a map that removes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps import TokenMap, group_map
from ..ops.attention import full_precision
from .selection import real_rows, settled_rows
from .tokens import Tokens

_SLICE = 256  # patches whose cosines with all others are computed at once


class Verdict(NamedTuple):
    """What two thresholds say of the patches [B, M] each.

    Attributes:
        into: the patch that each one would merge into; itself for destinations and for those that are gone.
        taken: 1 for those that merge, with the gradient of the threshold in training.
        stays: 1 for those that neither merge nor are pruned, likewise.
        importance: of a patch and what merged into it, without gradient.
    """

    into: Tensor
    taken: Tensor
    stays: Tensor
    importance: Tensor


def judge(
    tokens: Tokens,
    importance: Tensor,
    metric: Tensor,
    alike: Tensor,
    least: Tensor,
    temperature: float,
) -> Verdict:
    """Patches in turn are sources and destinations; a source merges into its likest destination, or it does not.

    What then weighs too little is pruned; the patch that weighs most always stays. Patches that are gone (padding,
    hidden, or behind closed gates) are left out of the turns, so that both forms of training and inference agree.

    Args:
        tokens: the tokens.
        importance: [B, M], without gradient.
        metric: what patches are alike by [B, M, D].
        alike: cosine above which a source merges, a scalar.
        least: importance, as a multiple of the mean over the tokens, below which a patch is pruned, a scalar.
        temperature: of the sigmoids whose gradients pass straight through.
    """
    prefix = tokens.layout.num_prefix
    left = tokens.left[:, prefix:] > 0.5
    with full_precision(metric):
        with torch.no_grad():
            turn = left.long().cumsum(1) % 2  # 1 for the first one that is left
            source, target = left & (turn == 1), left & (turn == 0)
            units = F.normalize(metric.float(), dim=-1)
            best, partner = _likest(units, target)
            index = torch.arange(left.shape[1], device=left.device).expand_as(partner)
            possible = source & target.any(1, keepdim=True)
            into = torch.where(possible, partner, index)
            best = best.masked_fill(~possible, -2.0)
            # differences of maps give importances below 0; at a threshold of 0 everything stays
            importance = importance.clamp(min=0).masked_fill(~left, 0.0) * tokens.left.sum(1, keepdim=True)
        taken = _above(best - alike.float(), temperature) * possible
        with torch.no_grad():
            hard = (taken > 0.5).float()
            importance = importance * (1 - hard) + torch.zeros_like(importance).scatter_add(1, into, importance * hard)
            remaining = left & (hard < 0.5)
            first = importance.masked_fill(~remaining, -1.0).argmax(1, keepdim=True)
            safe = index == first
        weighs = _above(importance - least.float(), temperature)
        weighs = torch.where(safe, torch.ones_like(weighs), weighs)
        return Verdict(into, taken, (1 - taken) * weighs * left, importance)


def _likest(units: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The best cosine of every patch with a destination, and which one that is [B, M] each; in slices, not all at once.

    Args:
        units: [B, M, D] of unit length.
        target: [B, M] bool, the destinations.
    """
    parts = [
        torch.bmm(rows, units.transpose(1, 2)).masked_fill(~target.unsqueeze(1), -2.0).max(dim=2)
        for rows in units.split(_SLICE, dim=1)
    ]
    return torch.cat([part.values for part in parts], dim=1), torch.cat([part.indices for part in parts], dim=1)


def _above(margin: Tensor, temperature: float) -> Tensor:
    """1 where the margin is not below 0, else 0, with the gradient of a sigmoid."""
    soft = (margin / temperature).sigmoid()
    hard = (margin >= 0).to(soft.dtype)
    return soft + (hard - soft).detach() if soft.requires_grad else hard


def removed(verdict: Verdict, tokens: Tokens, most: int | None) -> TokenMap | None:
    """The map that removes what does not stay, None where all stay; patches keep their order.

    Args:
        verdict: from `judge`.
        tokens: the tokens.
        most: patches that an image may keep, which makes the shape static; None looks at the longest image.
    """
    prefix, patches = tokens.layout.num_prefix, tokens.num_patches
    stays = verdict.stays > 0.5
    if most is not None and most < patches:
        best = verdict.importance.masked_fill(~stays, -1.0).topk(most, dim=1).indices
        ranks = stays.float() * 0  # zeros of the mask itself: a traced graph would hold on to the batch of new ones
        stays = stays & (ranks.scatter(1, best, best.float() * 0 + 1) > 0.5)
    counts = stays.sum(1, keepdim=True)
    if most is None:
        length, valid = settled_rows(counts, tokens)  # the one look of the host at the data
        if length == patches and valid is None:
            return None  # nothing goes
    else:
        length = min(most, patches)
        valid = real_rows(counts, length, prefix)
    slot = torch.where(stays, stays.long().cumsum(1) - 1, -1)
    slot = torch.where(verdict.taken > 0.5, slot.gather(1, verdict.into), slot)
    front = torch.arange(prefix, device=slot.device).expand(slot.shape[0], -1)
    assign = torch.cat([front, torch.where(slot >= 0, slot + prefix, -1)], dim=1)
    heads = F.pad(stays, (prefix, 0), value=True)
    weight = tokens.sizes() * (assign >= 0).unsqueeze(-1)
    return group_map(assign, heads, prefix + length, weight, valid)
