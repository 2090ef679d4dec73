"""Matching in order of energy: tokens of large clusters merge, tokens that stand alone are protected.

Source: Tran, Nguyen, Le, et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import take_rows
from .bipartite import Pairs, best_partner, with_rank, without_hidden

SPLITS = ("alternate", "halves", "all")
_CHUNK_ABOVE = 1024
_CHUNK = 256


def cluster_energy(
    units: Tensor, margin: float, alpha: float = 1.0, gaussian: bool = False, counted: Tensor | None = None
) -> Tensor:
    """How strongly every token resembles the whole set, itself included [B, T] float32; in slices where T is large.

    Args:
        units: what likeness is measured on, of unit length [B, T, D].
        margin: cosine above which others count as alike.
        alpha: scale of the exponential branch, below the margin.
        gaussian: a normal density of width 1 - margin in place of the exponential linear unit.
        counted: [B, T] bool, False for tokens that add nothing (padding, hidden ones); None counts all.
    """
    total, share = units.shape[1], None
    offset = units.new_full((1, 1, 1), -margin)  # rides along with the product
    if counted is not None:
        share = counted.float() / counted.sum(1, keepdim=True).clamp(min=1)

    def mean(part: Tensor) -> Tensor:
        above = torch.baddbmm(offset, part, units.transpose(1, 2))
        if gaussian:
            width = 1 - margin
            likeness = torch.exp(-0.5 * (above / width - 1).square()) / (width * math.sqrt(2 * math.pi))
        elif share is None:
            return _mean_elu(above, alpha)
        else:
            likeness = F.elu(above, alpha, inplace=True)
        return likeness.mean(2) if share is None else (likeness * share.unsqueeze(1)).sum(2)

    if total <= _CHUNK_ABOVE:
        return mean(units)
    return torch.cat([mean(part) for part in units.split(_CHUNK, dim=1)], dim=1)


def _mean_elu(x: Tensor, alpha: float) -> Tensor:
    """`F.elu(x, alpha).mean(-1)` in half of its time; x is overwritten."""
    total = x.sum(-1)
    below = x.clamp_(max=0).sum(-1)
    return (total - below + alpha * (x.exp_().sum(-1) - x.shape[-1])) / x.shape[-1]


def energy_pairs(units: Tensor, energy: Tensor, r: int, split: str = "alternate", num_prefix: int = 0) -> Pairs:
    """What `energy_groups` says where nothing is padded or hidden, ready for `MergeMap`.

    Args:
        units: what similarity is measured on, of unit length [B, T, D].
        energy: [B, T].
        r: tokens that merge.
        split: "alternate", "halves" or "all".
        num_prefix: tokens in front of these, which stay.
    """
    order = energy.argsort(dim=1, descending=True)
    if split == "all":
        src, dst, rest = order[:, 0::2], order[:, 1::2], order[:, :0]
    elif split == "halves":
        src, dst, rest = order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
    else:
        src, dst, rest = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    value, slot = best_partner(take_rows(units, src), take_rows(units, dst))
    if split == "all":
        turn = value.argsort(dim=1, descending=True)
        slot, rest, src = slot.gather(1, turn[:, :r]), src.gather(1, turn[:, r:]), src.gather(1, turn[:, :r])
    front = torch.arange(-num_prefix, 0, device=order.device).expand(order.shape[0], -1)
    stays = torch.cat([front, rest, dst], dim=1)
    if num_prefix:
        stays, src = stays + num_prefix, src + num_prefix
    return Pairs(stays, src, slot + (num_prefix + rest.shape[1]))


def energy_groups(
    units: Tensor,
    energy: Tensor,
    r: int,
    split: str = "alternate",
    real: Tensor | None = None,
    own: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges r tokens of each image, chosen by falling energy.

    "alternate" and "halves": of the 2r tokens of highest energy, every second one or the first half merges into the
    most similar one of the others; all further ones are protected. The new order is [protected, receiving], each by
    falling energy. "all": every second token of all proposes, and the r best proposals merge; the new order is
    [sources that stay by falling similarity, receiving by falling energy].

    Args:
        units: what similarity is measured on, of unit length [B, T, D].
        energy: [B, T]; tokens that a mask hides have the highest, padding has the lowest.
        r: tokens that merge in every image, or in the one with the most.
        split: "alternate", "halves" or "all".
        real: number of real tokens of each image [B, 1] where there is padding, else None.
        own: tokens that merge in each image [B, 1], needed with `real`.
        visible: [B, T] bool; nobody merges into hidden tokens while there is another way. None without a mask.

    Returns:
        New index of every token [B, T], -1 for padding, and [B, T] bool: one token of each new one, its head.
    """
    batch, total = energy.shape
    order = energy.argsort(dim=1, descending=True)
    rank = torch.arange(total, device=energy.device)
    count, own = (total, r) if real is None else (real, own)
    if split == "all":
        src, dst, receiving = rank[0::2], rank[1::2], count // 2
    else:
        src, dst = (rank[:r], rank[:r] + own) if split == "halves" else (rank[0 : 2 * r : 2], rank[1 : 2 * r : 2])
        receiving = own
    src, dst = src.expand(batch, -1), dst.expand(batch, -1)
    receives = (rank[: dst.shape[1]] < receiving).expand_as(dst)
    value, partner = _best(units, order.gather(1, src), order.gather(1, dst), receives, real, visible, receiving)
    if split == "all":
        value = value.masked_fill(src >= count, float("-inf"))
        turn = value.argsort(dim=1, descending=True).argsort(dim=1)
        stays = torch.where(src < count, turn - own, -1)
    else:
        turn, stays = rank[:r].expand(batch, -1), torch.full_like(src, -1)
    merges = turn < own
    first = count - receiving - own  # of the receiving ones in the new order
    into = torch.where(receives, first + rank[: dst.shape[1]], -1)
    moved = torch.where(merges, into.gather(1, partner), stays)
    protected = torch.where((rank >= 2 * own) & (rank < count), rank - 2 * own, -1).expand(batch, -1)
    slot = torch.full_like(order, -1) if split == "all" else protected
    # where images differ in r, a place can have a role in one set and none in the other
    for at, new in ((src, moved), (dst, into)):
        slot = torch.maximum(slot, torch.full_like(order, -1).scatter(1, at, new))
    gone = torch.zeros_like(order, dtype=torch.bool).scatter(1, src, merges)
    head = torch.empty_like(gone).scatter(1, order, (slot >= 0) & ~gone)
    return torch.empty_like(order).scatter(1, order, slot), head


def _best(
    units: Tensor, src: Tensor, dst: Tensor, receives: Tensor, real: Tensor | None, visible: Tensor | None,
    receiving: int | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score and place of the best receiving token [B, S] of every source; hidden sources score inf."""
    a, b = take_rows(units, src), take_rows(units, dst)
    if real is None and visible is None:
        return best_partner(a, b)
    bias = torch.zeros_like(dst, dtype=a.dtype)
    if visible is not None:
        bias = bias.masked_fill(~visible.gather(1, dst), -4.0)
    value, partner = best_partner(*with_rank(a, b, bias.masked_fill(~receives, -8.0)))
    if visible is None:
        return value, partner
    value, partner = without_hidden(value, partner, receiving)
    return value.masked_fill(~visible.gather(1, src), float("inf")), partner
