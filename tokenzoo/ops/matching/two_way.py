"""Bidirectional matching by several criteria (MCTF: Lee, Choi, Kim, CVPR 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import full_precision
from .bipartite import Pairs, own_ranked, split_ranked, stand_by_parity

_CHUNK_ABOVE = 1024
_CHUNK = 256


def token_factor(
    received: Tensor, size: Tensor | None, tau_info: float, tau_size: float, visible: Tensor | None = None
) -> Tensor:
    """Factor of every token in a pair score [B, N]: large for little attention received and for small sizes.

    Args:
        received: mean attention received [B, N].
        size: [B, N, 1] or None while all are one.
        tau_info: temperature of attention received, 0 for off.
        tau_size: temperature of size, 0 for off.
        visible: [B, N] bool; hidden tokens get factor 0 and set no scale. None without a mask.
    """
    factor = torch.ones_like(received) if visible is None else visible.to(received.dtype)
    if tau_info:
        info = _beside_largest(1 / received.clamp(min=1e-30), visible)
        factor = factor * info ** (1 / tau_info)
    if tau_size and size is not None:
        small = _beside_largest(1 / size.squeeze(-1).clamp(min=1e-30), visible)
        factor = factor * small ** (1 / tau_size)
    return factor


def _beside_largest(values: Tensor, visible: Tensor | None) -> Tensor:
    """Positive values [B, N] as shares of the largest, hidden ones zero."""
    if visible is None:
        return values / values.amax(1, keepdim=True)
    values = values * visible
    return values / values.amax(1, keepdim=True).clamp(min=1e-30)


def fusion_pairs(
    x: Tensor,
    received: Tensor,
    size: Tensor | None,
    r: int,
    num_prefix: int,
    taus: tuple[float, float, float],
    bidirectional: bool,
    valid: Tensor | None = None,
    own_r: Tensor | None = None,
    visible: Tensor | None = None,
) -> Pairs:
    """Merges r // 2 even tokens into odd ones, then the rest of r odd tokens into even ones that are left.

    Scores are the product of ((cos + 1) / 2) ^ (1 / tau_sim) and the `token_factor` of both tokens. A token that
    received something may itself merge in the second step, and its group moves along. Prefix tokens stay out of it.
    The order of the result is [prefix, even (ascending with a prefix), odd (by falling score; ascending if not
    bidirectional)].

    Args:
        x: residual stream [B, N, C].
        received: mean attention received [B, N].
        size: [B, N, 1] or None.
        r: tokens to remove.
        num_prefix: tokens at the front that stay.
        taus: temperatures of similarity, information and size; 0 switches one off.
        bidirectional: False merges all r from even to odd.
        valid: [B, N] bool with real tokens in front, or None.
        own_r: tokens to remove of each image [B, 1], needed with `valid`.
        visible: [B, N] bool, False for tokens that a mask hides: they merge first, in both steps, and receive only
            where nobody else is left. None without a mask.
    """
    x = F.normalize(x.float(), dim=-1)
    factor = token_factor(received.float(), size, taus[1], taus[2], visible)
    pe, po, n = (num_prefix + 1) // 2, num_prefix // 2, x.shape[1]
    even, odd = x[:, 2 * pe :: 2], x[:, 2 * po + 1 :: 2]
    even_factor, odd_factor = factor[:, 2 * pe :: 2], factor[:, 2 * po + 1 :: 2]
    real_even = real_odd = None
    if valid is not None:
        real_even, real_odd = valid[:, 2 * pe :: 2], valid[:, 2 * po + 1 :: 2]
        # scores of real pairs are positive: a zero factor puts padding last as a partner
        even_factor, odd_factor = even_factor * real_even, odd_factor * real_odd
    # scores are at least zero: hidden partners come behind all visible ones, and those that are gone behind these
    even_rank = odd_rank = None
    if visible is not None:
        rank = torch.where(visible, 0.0, -1.0)
        even_rank, odd_rank = rank[:, 2 * pe :: 2], rank[:, 2 * po + 1 :: 2]
    r1 = r // 2 if bidirectional else r
    r2 = r - r1
    own1 = None if own_r is None else (own_r // 2 if bidirectional else own_r)

    def scores(rows: Tensor, row_factor: Tensor, others: Tensor, other_factor: Tensor) -> Tensor:
        """Score of every row with every other token."""
        score = row_factor.unsqueeze(2) * other_factor.unsqueeze(1)
        if taus[0]:
            with full_precision(rows):
                similarity = ((torch.bmm(rows, others.transpose(1, 2)) + 1) / 2).clamp(min=0)
            score = score * (similarity if taus[0] == 1 else similarity ** (1 / taus[0]))
        return score

    def best(
        rows: Tensor, row_factor: Tensor, others: Tensor, other_factor: Tensor, rank: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Best partner of every row, (score, index), in slices of rows."""
        parts = [
            _ranked(scores(r, f, others, other_factor), rank).max(dim=2)
            for r, f in zip(rows.split(_CHUNK, dim=1), row_factor.split(_CHUNK, dim=1))
        ]
        return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)

    # few tokens: one score table serves both directions; many: recompute it in slices rather than keep it
    table = scores(even, even_factor, odd, odd_factor) if even.shape[1] <= _CHUNK_ABOVE else None
    if table is None:
        value, partner = best(even, even_factor, odd, odd_factor, odd_rank)
    else:
        value, partner = _ranked(table, odd_rank).max(dim=2)
    if visible is not None:
        value = value.masked_fill(even_rank < 0, float("inf"))
    if valid is None:
        src1, stay1, _ = split_ranked(value, r1, None, None)
        if num_prefix:
            stay1 = stay1.sort(dim=1)[0]
        left, odd_start = torch.ones_like(even_factor).scatter(1, src1, 0.0), num_prefix + stay1.shape[1]
    else:
        merged1, rank1 = own_ranked(value, real_even, own1)
        left = (~merged1).to(even_factor.dtype)

    if r2:
        rank = None if visible is None else torch.where(left > 0, even_rank, -2.0)
        if table is None:
            value2, partner2 = best(odd, odd_factor, even, even_factor * left, rank)
        else:
            scored = table * left.unsqueeze(2)
            value2, partner2 = (scored if rank is None else scored + rank.unsqueeze(2)).max(dim=1)
        if visible is not None:
            value2 = value2.masked_fill(odd_rank < 0, float("inf"))
        if valid is not None:
            merged2, rank2 = own_ranked(value2, real_odd, own_r - own1)
            return _padded(r, num_prefix, valid, own_r, (merged1, rank1, partner), (merged2, rank2, partner2))
        src2, stay2, _ = split_ranked(value2, r2, None, None)
        slot_odd = _numbered(stay2, odd.shape[1], odd_start)
        slot_even = _numbered(stay1, even.shape[1], num_prefix)
        slot_odd = slot_odd.scatter(1, src2, slot_even.gather(1, partner2.gather(1, src2)))
    elif valid is not None:
        return _padded(r, num_prefix, valid, own_r, (merged1, rank1, partner), None)
    else:
        stay2 = torch.arange(odd.shape[1], device=x.device).expand(x.shape[0], -1)
        src2 = stay2[:, :0]
        slot_odd = stay2 + odd_start
    slot1 = slot_odd.gather(1, partner.gather(1, src1))
    prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
    order = torch.cat([prefix, 2 * (stay1 + pe), 2 * (stay2 + po) + 1], dim=1)
    src = torch.cat([2 * (src1 + pe), 2 * (src2 + po) + 1], dim=1)
    slot = torch.cat([slot1, slot_odd.gather(1, src2)], dim=1)
    assert order.shape[1] == n - r
    return Pairs(order, src, slot)


_Merging = tuple[Tensor, Tensor, Tensor]  # which tokens of one parity merge, their ranks, their partners of the other


def _padded(
    r: int, num_prefix: int, valid: Tensor, own_r: Tensor, evens: _Merging, odds: _Merging | None
) -> Pairs:
    """The pairs of images with padding, each as alone: the order of `fusion_pairs`, and none where nothing merges."""
    n, pe, po = valid.shape[1], (num_prefix + 1) // 2, num_prefix // 2
    index = torch.arange(n, device=valid.device).expand_as(valid)
    place, target = index, torch.full_like(index, -1)
    even = 2 * (torch.arange(evens[0].shape[1], device=valid.device) + pe).expand_as(evens[1])
    if not num_prefix:
        place = place.scatter(1, even, evens[1])
    into = 2 * (evens[2] + po) + 1
    if odds is not None:
        odd = 2 * (torch.arange(odds[0].shape[1], device=valid.device) + po).expand_as(odds[1]) + 1
        place = place.scatter(1, odd, odds[1])
        target = target.scatter(1, odd, torch.where(odds[0], 2 * (odds[2] + pe), -1))
        moved = target.gather(1, into)
        into = torch.where(moved < 0, into, moved)
    target = target.scatter(1, even, torch.where(evens[0], into, -1))
    return stand_by_parity(place, target, r, num_prefix, valid, own_r == 0)


def _ranked(score: Tensor, rank: Tensor | None) -> Tensor:
    """Scores [B, n, m] with the rank [B, m] of every partner added; None leaves them as they are."""
    return score if rank is None else score + rank.unsqueeze(1)


def _numbered(rows: Tensor, length: int, start: int) -> Tensor:
    """[B, length] with start, start + 1, ... at the given rows and -1 elsewhere."""
    numbers = torch.arange(start, start + rows.shape[1], device=rows.device).expand_as(rows)
    return torch.full((rows.shape[0], length), -1, device=rows.device, dtype=rows.dtype).scatter(1, rows, numbers)
