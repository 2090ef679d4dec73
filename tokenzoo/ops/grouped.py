"""Attention in groups of a sorted sequence: every group looks at itself and the next one.

Source: Liu, Liu, Tang, Wu, "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image
Super-Resolution", CVPR 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mirrored(n: int, places: Tensor) -> Tensor:
    """Indices of a sequence of n that goes on in reverse behind its end, and so on."""
    turn = places % (2 * n)
    return torch.where(turn < n, turn, 2 * n - 1 - turn)


def windows(n: int, size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Places of the queries [G, size] and of the keys [G, 2 size] of every group; the first n queries are real ones."""
    size = min(n, size)
    starts = torch.arange(-(-n // size), device=device).unsqueeze(1) * size
    return tuple(mirrored(n, starts + torch.arange(width, device=device)) for width in (size, 2 * size))


def attend_in_groups(
    q: Tensor, k: Tensor, v: Tensor, size: int, scale: float | None = None, bias: Tensor | None = None,
    front_k: Tensor | None = None, front_v: Tensor | None = None, mirror: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of a sorted sequence [B, H, N, Dv].

    Args:
        q, k, v: [B, H, N, D], sorted.
        size: tokens per group.
        scale: of the logits; None for one over the root of D.
        bias: of the logits [B, 1 or H, 1 or N, P + N], rows and columns sorted; None for none.
        front_k, front_v: keys and values that every group looks at besides [B, H, P, D]; None for none.
        mirror: the sequence goes on in reverse behind its end, as released; else the last group looks at itself alone.
    """
    batch, heads, n, _ = q.shape
    asking, looked = windows(n, size, q.device)

    def parts(x: Tensor, places: Tensor) -> Tensor:  # [B * G, H, places, D]
        return x[:, :, places].transpose(1, 2).flatten(0, 1)

    keys, values, mask = parts(k, looked), parts(v, looked), None
    front = 0 if front_k is None else front_k.shape[2]
    if front:
        keys = torch.cat([front_k.repeat_interleave(len(asking), 0), keys], dim=2)
        values = torch.cat([front_v.repeat_interleave(len(asking), 0), values], dim=2)
    if bias is not None:
        bias = bias.expand(batch, -1, -1, -1)
        ahead, columns = torch.arange(front, device=q.device).expand(len(asking), -1), looked + front
        columns = torch.cat([ahead, columns], dim=1)
        if bias.shape[2] == 1:
            mask = bias[:, :, 0][:, :, columns].transpose(1, 2).unsqueeze(3).flatten(0, 1)  # [B * G, H, 1, P + 2 size]
        else:
            mask = bias[:, :, asking.unsqueeze(2), columns.unsqueeze(1)].transpose(1, 2).flatten(0, 1)
        mask = mask.to(q.dtype)
    if not mirror:
        width = looked.shape[1]
        start = torch.arange(len(looked), device=q.device).unsqueeze(1) * (width // 2)
        at = start + torch.arange(width, device=q.device)
        past = F.pad(at >= n, (front, 0)).repeat(batch, 1)[:, None, None, :]  # [B * G, 1, 1, P + 2 size]
        mask = torch.zeros(past.shape, dtype=q.dtype, device=q.device) if mask is None else mask
        mask = mask.masked_fill(past, float("-inf"))
    out = F.scaled_dot_product_attention(parts(q, asking), keys, values, attn_mask=mask, scale=scale)
    out = out.unflatten(0, (batch, len(asking))).transpose(1, 2)  # [B, H, G, size, Dv]
    return out.flatten(2, 3)[:, :, :n]


def looked_at(counts: Tensor, total: int, size: int) -> Tensor:
    """Which keys each query of a sorted sequence looks at without a mirror [B, N, N] float32, lengths may differ.

    Args:
        counts: tokens of each image [B], in front of what fills it up.
        total: N.
        size: tokens per group.
    """
    rank = torch.arange(total, device=counts.device)
    own = counts.clamp(min=1, max=size).view(-1, 1, 1)
    last = (counts.clamp(min=1).view(-1, 1) - 1) // own.squeeze(2)
    group = torch.minimum(rank // own.squeeze(2), last)  # [B, N]
    width = 2 * min(size, total)
    offset = torch.arange(width, device=counts.device)
    looked = mirrored(counts.clamp(min=1).view(-1, 1, 1), group.unsqueeze(2) * own + offset)  # [B, N, width]
    inside = (offset < 2 * own) & (group.unsqueeze(2) * own + offset < counts.clamp(min=1).view(-1, 1, 1))
    seen = inside.to(torch.float32)
    return torch.zeros(*group.shape, total, device=counts.device).scatter_add(2, looked, seen)
