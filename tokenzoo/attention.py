"""The one attention core that all adapters share: fused attention, single softmax rows, and column means."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows computed at once when a statistic of the whole map is needed: at most this share of N (per head).
_MAX_MAP_SHARE = 4
_SMALL = 512


class Heads(NamedTuple):
    """Projected queries, keys and values of one attention layer.

    Attributes:
        q: [B, H, N, D], after every norm and rotation.
        k: [B, H, N, D].
        v: [B, H, N, Dv], None while only the map is needed. Differential attention has H / 2 heads here.
        scale: factor of the logits.
        lam: differential attention subtracts lam times the odd maps from the even ones; None for ordinary attention.
        fused: use `scaled_dot_product_attention`.
        dropout: dropout probability on the map (0 outside training).
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float
    lam: Tensor | None = None
    fused: bool = True
    dropout: float = 0.0


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves float32 alone: scores and matching are computed in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def attend(heads: Heads, bias: Tensor | None = None) -> Tensor:
    """Attention output of every query row.

    Args:
        heads: projected heads; `heads.q` may hold fewer rows than `heads.k`.
        bias: added to the logits, broadcastable to [B, H, Nq, N]; None for none.

    Returns:
        [B, Nq, H * Dv], heads side by side.
    """
    if heads.lam is None:
        out = _attend(heads, heads.q, heads.k, bias)
    else:
        q1, q2 = heads.q.unflatten(1, (-1, 2)).unbind(2)
        k1, k2 = heads.k.unflatten(1, (-1, 2)).unbind(2)
        out = _attend(heads, q1, k1, bias) - heads.lam * _attend(heads, q2, k2, bias)
    return out.transpose(1, 2).flatten(2)


def _attend(heads: Heads, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.to(q.dtype)
    if heads.fused:
        return F.scaled_dot_product_attention(
            q, k, heads.v, attn_mask=bias, dropout_p=heads.dropout, scale=heads.scale
        )
    logits = (q * heads.scale) @ k.transpose(-2, -1)
    probs = (logits if bias is None else logits + bias).softmax(dim=-1)
    if heads.dropout:
        probs = F.dropout(probs, heads.dropout)
    return probs @ heads.v


def attention_rows(heads: Heads, start: int, stop: int, bias: Tensor | None = None) -> Tensor:
    """Softmax rows of the queries start..stop-1 in float32, before dropout: [B, H, stop - start, N]."""
    q, k = heads.q[:, :, start:stop].float(), heads.k.float()
    if bias is not None and bias.shape[-2] != 1:
        bias = bias[..., start:stop, :]
    with full_precision(q):
        logits = (q * heads.scale) @ k.transpose(-2, -1)
    rows = (logits if bias is None else logits + bias.float()).softmax(dim=-1)
    if heads.lam is None:
        return rows
    first, second = rows.unflatten(1, (-1, 2)).unbind(2)
    return first - heads.lam.float() * second


def attention_received(heads: Heads, bias: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
    """Mean attention that every token receives, over heads and queries.

    The map is computed a slice of query rows at a time and never stored.

    Args:
        heads: projected heads.
        bias: added to the logits, see `attend`.
        queries: [B, N] bool, the queries that count (real tokens); None counts all.

    Returns:
        [B, N] float32.
    """
    total = heads.q.shape[2]
    step = total if total <= _SMALL else max(1, total // (_MAX_MAP_SHARE * heads.q.shape[1]))
    received = None
    for start in range(0, total, step):
        rows = attention_rows(heads, start, min(start + step, total), bias)
        if queries is not None:
            rows = rows * queries[:, None, start : start + step, None]
        part = rows.sum(dim=(1, 2)) / rows.shape[1]
        received = part if received is None else received + part
    if queries is None:
        return received / total
    return received / queries.sum(1, keepdim=True)


def key_bias(size: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Bias of the keys: log size (proportional attention) and -inf for padding.

    Args:
        size: [B, N, 1] or None.
        valid: [B, N] bool or None.

    Returns:
        [B, 1, 1, N] float32, or None when there is nothing to add.
    """
    if size is None and valid is None:
        return None
    bias = torch.zeros(valid.shape, device=valid.device) if size is None else size.squeeze(-1).log()
    if valid is not None:
        bias = bias.masked_fill(~valid, float("-inf"))
    return bias[:, None, None, :]
