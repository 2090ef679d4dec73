"""Bipartite matching of tokens: which token merges into which (ToMe and its relatives)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import full_precision
from ..rows import split_dim

_CHUNK_ABOVE = 1024  # score rows are computed in slices when there are more of them than this
_CHUNK = 256


class Pairs(NamedTuple):
    """A merge plan, ready for `MergeMap`.

    Attributes:
        order: old index of the token that heads each new one [B, N'].
        src: old index of every token that is merged away [B, S].
        slot: new index it goes to [B, S], -1 for none.
        valid: [B, N'] bool, or None without padding.
    """

    order: Tensor
    src: Tensor
    slot: Tensor
    valid: Tensor | None = None


def best_partner(a: Tensor, b: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Best partner in b of every row of a, by dot product.

    Args:
        a: [B, Na, D].
        b: [B, Nb, D].
        first: partners before this index are forbidden.

    Returns:
        value [B, Na] and index [B, Na] of the best partner; scores are computed in slices when there are many.
    """
    target = b[:, first:].transpose(1, 2)
    with full_precision(a):
        if a.shape[1] <= _CHUNK_ABOVE:
            value, index = torch.bmm(a, target).max(dim=2)
            return value, index + first
        parts = [torch.bmm(rows, target).max(dim=2) for rows in a.split(_CHUNK, dim=1)]
    return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1) + first


def bipartite_pairs(
    metric: Tensor,
    r: int,
    num_prefix: int,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    penalty: Tensor | None = None,
) -> Pairs:
    """The r most similar pairs between tokens at even and at odd positions (ToMe: Bolya et al., ICLR 2023).

    Every even token proposes its most similar odd token; the r best proposals merge. Prefix tokens neither merge nor
    receive. The order of the result is [prefix, unmerged even, odd], which gives new neighbours at the next block; it
    is ascending with a prefix and by falling similarity without one, as in the published code.

    Args:
        metric: what similarity is measured on [B, N, D].
        r: pairs to merge, at most (N - num_prefix) // 2.
        num_prefix: tokens at the front that stay out of it.
        valid: [B, N] bool with the real tokens in front; padding never receives and never proposes, an image with
            fewer real tokens merges at most half of its own, whatever its batch mates hold.
        visible: [B, N] bool, False for tokens that a mask hides: they merge first, and nobody merges into them while
            there is another way. Their own values decide nothing about visible tokens.
        penalty: taken off the score of every token [B, N]; None for none.
    """
    with torch.no_grad():
        value, partner = best_odd(metric, num_prefix, valid, visible)
        if penalty is not None:
            value = value - penalty[:, num_prefix + num_prefix % 2 :: 2]
        return _plan(value, partner, r, num_prefix, valid, metric.shape[1])


def best_odd(
    metric: Tensor, num_prefix: int, valid: Tensor | None = None, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar odd token of every even one, prefix tokens left out on both sides.

    Args:
        metric: what similarity is measured on [B, N, D].
        num_prefix: tokens at the front that stay out of it.
        valid: [B, N] bool with the real tokens in front; padding is nobody's partner while there is a real one.
        visible: [B, N] bool; hidden tokens are nobody's partner while there is a visible one.

    Returns:
        Cosine [B, E] and partner [B, E] (its place among all odd tokens) of the even tokens after the prefix; padding
        scores -inf, hidden tokens inf, and tokens without a visible partner below -2.
    """
    metric = F.normalize(metric.float(), dim=-1)
    even, odd = metric[:, 0::2], metric[:, 1::2]
    pe, po = (num_prefix + 1) // 2, num_prefix // 2  # prefix tokens among the even and the odd ones
    if valid is None and visible is None:
        return best_partner(even[:, pe:], odd, po)
    rank = partner_rank(valid, visible)
    even, odd = with_rank(even, odd, rank[:, 1::2])
    value, partner = best_partner(even[:, pe:], odd, po)
    if visible is not None:
        value, partner = without_hidden(value, partner, odd.shape[1] - po, po)
    return ranked_first(value, valid, visible, slice(2 * pe, None, 2)), partner


def partner_rank(valid: Tensor | None, visible: Tensor | None) -> Tensor:
    """What is added to the cosine with every token [B, N]: visible ones 0, hidden ones and padding less than -2."""
    if visible is None:
        return torch.where(valid, 0.0, -4.0)
    rank = torch.where(visible, 0.0, -4.0)
    return rank if valid is None else torch.where(valid, rank, -8.0)


def with_rank(a: Tensor, b: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors whose products are those of a [B, Na, D] and b [B, Nb, D] plus the rank of b [B, Nb]."""
    # a zero vector would score 0, as good as many a real partner
    return torch.cat([a, torch.ones_like(a[..., :1])], dim=2), torch.cat([b, rank.unsqueeze(2).to(b.dtype)], dim=2)


def without_hidden(value: Tensor, partner: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Scores and partners [B, n] in which hidden partners are taken in turn, whatever they hold.

    Args:
        value: cosine of every source with its best partner, rank included.
        partner: that partner.
        count: partners there are, of all images or of each [B, 1].
        first: index of the first one.
    """
    lost = value < -2
    count = max(1, count) if isinstance(count, int) else count.clamp(min=1)
    turn = torch.arange(value.shape[1], device=value.device) % count + first
    return value.masked_fill(lost, -4.0), torch.where(lost, turn, partner)


def ranked_first(value: Tensor, valid: Tensor | None, visible: Tensor | None, at: slice | Tensor) -> Tensor:
    """Scores of sources [B, n] with hidden ones in front of all others and padding behind.

    Args:
        value: the scores.
        valid: [B, N] bool of all tokens, or None.
        visible: [B, N] bool of all tokens, or None.
        at: the sources among all tokens, a slice or indices [B, n].
    """

    def taken(flags: Tensor) -> Tensor:
        return flags[:, at] if isinstance(at, slice) else flags.gather(1, at)

    if visible is not None:
        value = value.masked_fill(~taken(visible), float("inf"))
    return value if valid is None else value.masked_fill(~taken(valid), float("-inf"))


def _plan(value: Tensor, partner: Tensor, r: int, num_prefix: int, valid: Tensor | None, n: int) -> Pairs:
    """Plan from the best partner of every even token (prefix rows left out) among the odd ones."""
    pe, po = (num_prefix + 1) // 2, num_prefix // 2
    if valid is not None:
        return _padded_plan(value, partner, r, num_prefix, valid)
    src, rest, _ = split_ranked(value, r, None, None)
    if num_prefix:
        rest = rest.sort(dim=1)[0]
    batch, device = value.shape[0], value.device
    prefix = torch.arange(num_prefix, device=device).expand(batch, -1)
    odd = torch.arange(2 * po + 1, n, 2, device=device).expand(batch, -1)
    order = torch.cat([prefix, 2 * (rest + pe), odd], dim=1)
    slot = partner.gather(1, src) - po + num_prefix + rest.shape[1]
    return Pairs(order, 2 * (src + pe), slot)


def _padded_plan(value: Tensor, partner: Tensor, r: int, num_prefix: int, valid: Tensor) -> Pairs:
    """`_plan` for images with padding: each merges as many as it would alone, and stands in the order it would have."""
    pe = (num_prefix + 1) // 2
    own = ((valid.sum(1, keepdim=True) - num_prefix) // 2).clamp(max=r)
    merged, rank = own_ranked(value, valid[:, 2 * pe :: 2], own)
    even = 2 * (torch.arange(value.shape[1], device=valid.device) + pe).expand_as(rank)
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    if not num_prefix:  # those that stay are not ascending then
        place = place.scatter(1, even, rank)
    target = torch.full_like(place, -1).scatter(1, even, torch.where(merged, 2 * partner + 1, -1))
    return stand_by_parity(place, target, r, num_prefix, valid)


def own_ranked(value: Tensor, real: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The real rows of highest value, a number of its own in each image, and the rank of all [B, n] both.

    Args:
        value: [B, n].
        real: [B, n] bool, False for padding.
        own: rows that each image takes [B, 1].
    """
    rank = value.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True).argsort(dim=1)
    return real & (rank < own), rank


def stand_by_parity(
    place: Tensor, target: Tensor, r: int, num_prefix: int, valid: Tensor, idle: Tensor | None = None
) -> Pairs:
    """Pairs of images with padding: prefix, even tokens that stay, odd ones, padding.

    Of an image with an odd number of patches, one may be left that its batch mates have no row for: rows are those of
    all tokens that stay, not those of each parity.

    Args:
        place: order among the tokens of the same parity [B, N], below N.
        target: token that each one merges into [B, N], -1 for those that stay.
        r: tokens that the longest image loses.
        num_prefix: tokens at the front.
        valid: [B, N] bool with the real tokens in front.
        idle: images that keep their order [B, 1] bool; None for none.
    """
    n = valid.shape[1]
    index = torch.arange(n, device=valid.device)
    group = torch.where(index < num_prefix, 0, 1 + index % 2)
    if idle is not None:
        group, place = torch.where(idle, 0, group), torch.where(idle, index, place)
    group = torch.where(valid, torch.where(target < 0, group, 4), 3)  # those that merge stand last
    order = (group * n + place).argsort(dim=1)
    left, src = order[:, : n - r], order[:, n - r :]
    into = target.gather(1, src)
    slot = torch.where(into < 0, -1, order.argsort(dim=1).gather(1, into.clamp(min=0)))
    return Pairs(left, src, slot, group.gather(1, left) < 3)


def split_ranked(
    value: Tensor, r: int, real: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ranks rows by falling value: the r that merge, those that stay, and which of the r count (None: all).

    Args:
        value: [B, n].
        r: rows that merge, the same for every image.
        real: [B, n] bool, False for padding, or None.
        own: rows that each image merges itself [B, 1]; padding fills up the r and counts for nothing.
    """
    if real is None:
        ranked = value.argsort(dim=1, descending=True)
        return ranked[:, :r], ranked[:, r:], None
    count = value.shape[1]
    rank = value.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True).argsort(dim=1)
    merges = real & (rank < own)
    # rows that count first, then padding, then real rows that stay
    key = torch.where(merges, rank, torch.where(real, 2 * count + rank, count + rank))
    ranked = key.argsort(dim=1)
    return ranked[:, :r], ranked[:, r:], merges.gather(1, ranked[:, :r])


def set_pairs(metric: Tensor, src: Tensor, dst: Tensor) -> Pairs:
    """Every source merges into its most similar destination; the new order is that of the destinations.

    Args:
        metric: [B, N, D].
        src: old indices of the sources [B, S].
        dst: old indices of the destinations [B, N - S].
    """
    with torch.no_grad():
        metric = F.normalize(metric.float(), dim=-1)
        index = lambda idx: idx.unsqueeze(-1).expand(-1, -1, metric.shape[-1])  # noqa: E731
        partner = best_partner(metric.gather(1, index(src)), metric.gather(1, index(dst)))[1]
    return Pairs(dst, src, partner)


def kth_pairs(metric: Tensor, k: int) -> Pairs:
    """Every k-th token is a destination, the k - 1 before it merge into their most similar destination (ToMe's `kth`).

    Tokens beyond the last full group are in neither set: cut them off first.

    Args:
        metric: [B, N, D] with N a multiple of k.
        k: group length, at least 2.
    """
    n = metric.shape[1]
    if k < 2 or n % k:
        raise ValueError(f"kth_pairs: k={k} does not divide {n} tokens into groups; use k >= 2 and cut the tail off")
    index = torch.arange(n, device=metric.device).expand(metric.shape[0], -1)
    index = split_dim(index, 1, n // k, k)
    return set_pairs(metric, index[..., : k - 1].flatten(1), index[..., k - 1])
