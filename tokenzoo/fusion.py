"""Bidirectional matching by several criteria (MCTF: Lee, Choi, Kim, CVPR 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import Pairs, compact_pairs, split_ranked

_CHUNK_ABOVE = 1024
_CHUNK = 256


def token_factor(received: Tensor, size: Tensor | None, tau_info: float, tau_size: float) -> Tensor:
    """Factor of every token in a pair score [B, N]: large for little attention received and for small sizes.

    Args:
        received: mean attention received [B, N].
        size: [B, N, 1] or None while all are one.
        tau_info: temperature of attention received, 0 for off.
        tau_size: temperature of size, 0 for off.
    """
    factor = torch.ones_like(received)
    if tau_info:
        info = 1 / received.clamp(min=1e-30)
        factor = factor * (info / info.amax(1, keepdim=True)) ** (1 / tau_info)
    if tau_size and size is not None:
        small = 1 / size.squeeze(-1).clamp(min=1e-30)
        factor = factor * (small / small.amax(1, keepdim=True)) ** (1 / tau_size)
    return factor


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
    """
    x = F.normalize(x.float(), dim=-1)
    factor = token_factor(received.float(), size, taus[1], taus[2])
    pe, po, n = (num_prefix + 1) // 2, num_prefix // 2, x.shape[1]
    even, odd = x[:, 2 * pe :: 2], x[:, 2 * po + 1 :: 2]
    even_factor, odd_factor = factor[:, 2 * pe :: 2], factor[:, 2 * po + 1 :: 2]
    real_even = real_odd = None
    if valid is not None:
        real_even, real_odd = valid[:, 2 * pe :: 2], valid[:, 2 * po + 1 :: 2]
        # scores of real pairs are positive: a zero factor puts padding last as a partner
        even_factor, odd_factor = even_factor * real_even, odd_factor * real_odd
    r1 = r // 2 if bidirectional else r
    r2 = r - r1
    own1 = None if own_r is None else (own_r // 2 if bidirectional else own_r)

    def scores(rows: Tensor, row_factor: Tensor, others: Tensor, other_factor: Tensor) -> Tensor:
        """Score of every row with every other token."""
        score = row_factor.unsqueeze(2) * other_factor.unsqueeze(1)
        if taus[0]:
            similarity = ((torch.bmm(rows, others.transpose(1, 2)) + 1) / 2).clamp(min=0)
            score = score * (similarity if taus[0] == 1 else similarity ** (1 / taus[0]))
        return score

    def best(rows: Tensor, row_factor: Tensor, others: Tensor, other_factor: Tensor) -> tuple[Tensor, Tensor]:
        """Best partner of every row, (score, index), in slices of rows."""
        parts = [
            scores(r, f, others, other_factor).max(dim=2)
            for r, f in zip(rows.split(_CHUNK, dim=1), row_factor.split(_CHUNK, dim=1))
        ]
        return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)

    # few tokens: one score table serves both directions; many: recompute it in slices rather than keep it
    table = scores(even, even_factor, odd, odd_factor) if even.shape[1] <= _CHUNK_ABOVE else None
    value, partner = best(even, even_factor, odd, odd_factor) if table is None else table.max(dim=2)
    src1, stay1, merges1 = split_ranked(value, r1, real_even, own1)
    if num_prefix:
        stay1 = stay1.sort(dim=1)[0]
    left = torch.ones_like(even_factor).scatter(1, src1, 0.0)
    slot_even = _numbered(stay1, even.shape[1], num_prefix)

    odd_start = num_prefix + stay1.shape[1]
    if r2:
        if table is None:
            value2, partner2 = best(odd, odd_factor, even, even_factor * left)
        else:
            value2, partner2 = (table * left.unsqueeze(2)).max(dim=1)
        own2 = None if own_r is None else own_r - own1
        src2, stay2, merges2 = split_ranked(value2, r2, real_odd, own2)
        slot_odd = _numbered(stay2, odd.shape[1], odd_start)
        moved = slot_even.gather(1, partner2.gather(1, src2))
        slot_odd = slot_odd.scatter(1, src2, moved if merges2 is None else torch.where(merges2, moved, -1))
    else:
        stay2 = torch.arange(odd.shape[1], device=x.device).expand(x.shape[0], -1)
        src2 = stay2[:, :0]
        slot_odd = stay2 + odd_start
    slot1 = slot_odd.gather(1, partner.gather(1, src1))
    if merges1 is not None:
        slot1 = torch.where(merges1, slot1, -1)
    prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
    order = torch.cat([prefix, 2 * (stay1 + pe), 2 * (stay2 + po) + 1], dim=1)
    src = torch.cat([2 * (src1 + pe), 2 * (src2 + po) + 1], dim=1)
    slot = torch.cat([slot1, slot_odd.gather(1, src2)], dim=1)
    assert order.shape[1] == n - r
    return Pairs(order, src, slot) if valid is None else compact_pairs(Pairs(order, src, slot), valid)


def _numbered(rows: Tensor, length: int, start: int) -> Tensor:
    """[B, length] with start, start + 1, ... at the given rows and -1 elsewhere."""
    numbers = torch.arange(start, start + rows.shape[1], device=rows.device).expand_as(rows)
    return torch.full((rows.shape[0], length), -1, device=rows.device, dtype=rows.dtype).scatter(1, rows, numbers)
