"""The one attention core that all adapters share: fused attention, single softmax rows, and column means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .channels import attend_channels
from .placed import GatedPlaces
from .rows import split_dim
from .talking import Talk

# Query rows that are computed at once when a statistic of the whole map is needed. On a CPU as many as stay in cache
# (three times faster than all of a batch at once); elsewhere, and in traced graphs, all rows of a short sequence, and
# of a long one so many that the rows of all heads together are a quarter of one N x N map.
_CPU_ROWS = 64
CACHE = 1 << 18  # entries of maps that fit into cache
_SHORT = 512


class Heads(NamedTuple):
    """Projected queries, keys and values of one attention layer.

    Attributes:
        q: [B, H, N, D], after every norm and rotation.
        k: [B, H, N, D].
        v: [B, H, N, Dv], None while only the map is needed. Differential attention has H / 2 heads here.
        scale: factor of the logits.
        lam: differential attention subtracts lam times the odd maps from the even ones; None for ordinary attention.
        fused: use `scaled_dot_product_attention`.
        dropout: dropout probability on the map (0 outside training), for the fused kernel.
        drop: what the layer puts its map through where it is written out, a module; None where there is none.
        kernel: attends in place of the fused kernel, (q, k, v, bias) -> [B, H, Nq, Dv], where a library lets its users
            choose one; None for that of torch.
        talk: mixes the maps of all heads in front of the softmax and behind it; never fused. None for heads that keep
            to themselves.
        placed: a second map by the places of query and key, which the first one is mixed with; never fused.
        temperature: factor of the logits among channels [H, 1, 1], for attention among these; None among tokens. Then q
            and k are what they are before the norm over tokens, and scale counts for nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    scale: float
    lam: Tensor | None = None
    fused: bool = True
    dropout: float = 0.0
    drop: Callable[[Tensor], Tensor] | None = None
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None
    talk: Talk | None = None
    placed: GatedPlaces | None = None
    temperature: Tensor | None = None


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves float32 alone: scores and matching are computed in float32.

    Tensors without values (the meta device) know no autocast.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def attend(heads: Heads, bias: Tensor | None = None) -> Tensor:
    """Attention output of every query row.

    Args:
        heads: projected heads; `heads.q` may hold fewer rows than `heads.k`.
        bias: added to the logits, broadcastable to [B, H, Nq, N]; None for none.

    Returns:
        [B, Nq, H * Dv], heads side by side.
    """
    if heads.kernel is not None:
        out = heads.kernel(heads.q, heads.k, heads.v, None if bias is None else bias.to(heads.q.dtype))
    elif heads.temperature is not None:
        out = attend_channels(heads.q, heads.k, heads.v, heads.temperature, bias, heads.fused, heads.drop)
    elif not heads.fused:
        out = _attend_written_out(heads, bias)
    elif heads.lam is None:
        out = _attend_fused(heads, heads.q, heads.k, bias)
    else:
        q1, q2 = split_dim(heads.q, 1, -1, 2).unbind(2)
        k1, k2 = split_dim(heads.k, 1, -1, 2).unbind(2)
        out = _attend_fused(heads, q1, k1, bias) - heads.lam * _attend_fused(heads, q2, k2, bias)
    return out.transpose(1, 2).flatten(2)


def _attend_fused(heads: Heads, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, heads.v, attn_mask=bias, dropout_p=heads.dropout, scale=heads.scale)


def _attend_written_out(heads: Heads, bias: Tensor | None) -> Tensor:
    """The map itself, which goes through the layer's dropout in one piece, as hooks on that module expect."""
    logits = (heads.q * heads.scale) @ heads.k.transpose(-2, -1)
    logits = logits if heads.talk is None else heads.talk.logits(logits)
    probs = (logits if bias is None else logits + bias.to(logits.dtype)).softmax(dim=-1)
    probs = probs if heads.talk is None else heads.talk.map(probs, bias)
    probs = probs if heads.placed is None else heads.placed.map(probs, bias)
    probs = drop_map(heads, probs)
    if heads.lam is not None:
        first, second = split_dim(probs, 1, -1, 2).unbind(2)
        probs = first - heads.lam * second
    return probs @ heads.v


def drop_map(heads: Heads, probs: Tensor) -> Tensor:
    """A written-out map behind the layer's dropout."""
    if heads.drop is not None:
        return heads.drop(probs)
    return F.dropout(probs, heads.dropout) if heads.dropout else probs


def attention_rows(heads: Heads, start: int, stop: int, bias: Tensor | None = None) -> Tensor:
    """Softmax rows of the queries start..stop-1 in float32, before dropout: [B, H, stop - start, N].

    Of heads that talk, the rows between the two mixings: these are shares of attention, which the second makes signed.
    """
    if heads.temperature is not None:
        raise ValueError(
            "attention between tokens was asked for, but this block attends among channels; use a method that reads "
            "keys or values alone, and declare the trait reads_maps for one that does not"
        )
    q, k = heads.q[:, :, start:stop].float(), heads.k.float()
    if bias is not None and bias.shape[-2] != 1:
        bias = bias[..., start:stop, :]
    with full_precision(q):
        if bias is None or heads.talk is not None:
            logits = (q * heads.scale) @ k.transpose(-2, -1)
            if heads.talk is not None:
                logits = heads.talk.logits(logits).float()
                logits = logits if bias is None else logits + bias.float()
        else:  # bias and scale ride along with the product
            added = bias.float().expand(*q.shape[:2], -1, -1).flatten(0, 1)
            logits = torch.baddbmm(added, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=heads.scale)
            logits = split_dim(logits, 0, *q.shape[:2])
    rows = logits.softmax(dim=-1)
    if heads.placed is not None:
        return heads.placed.queries(slice(start, stop)).map(rows, bias)
    if heads.lam is None:
        return rows
    first, second = split_dim(rows, 1, -1, 2).unbind(2)
    return first - heads.lam.float() * second


def attention_received(heads: Heads, bias: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
    """Mean attention that every token receives, over heads and queries.

    The map is computed a slice of query rows at a time and never stored.

    Args:
        heads: projected heads.
        bias: added to the logits, see `attend`.
        queries: [B, N] bool, the queries that count (real tokens that no mask hides); None counts all.

    Returns:
        [B, N] float32.
    """
    total = heads.q.shape[2]
    heads = heads._replace(k=heads.k.float().contiguous())  # once, not in every slice
    received = None
    for start, stop in row_slices(total, heads):
        rows = attention_rows(heads, start, stop, bias)
        if queries is not None:
            # a hidden query may see nothing at all, and its row be no number
            rows = rows.masked_fill(~queries[:, None, start:stop, None], 0)
        part = rows.sum(dim=(1, 2))
        received = part if received is None else received + part
    if queries is None:
        return received / (total * rows.shape[1])
    return received / (queries.sum(1, keepdim=True).clamp(min=1) * rows.shape[1])


def significance(importance: Tensor, values: Tensor) -> Tensor:
    """Importance times the norm of the values over all heads [B, N] float32 (Fayyaz et al., ECCV 2022).

    Args:
        importance: [B, N].
        values: [B, N, H, Dv].
    """
    return importance * values.float().flatten(2).norm(dim=2)


def row_slices(total: int, heads: Heads) -> list[tuple[int, int]]:
    """(start, stop) of the slices of query rows."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if heads.q.device.type == "cpu" and not traced:
        in_cache = CACHE // max(1, heads.q.shape[0] * heads.q.shape[1] * heads.k.shape[2])
        step = max(min(_CPU_ROWS, -(-total // 4)), min(total, in_cache), 1)
    else:
        step = total if total <= _SHORT else max(1, total // (4 * heads.q.shape[1]))
    return [(start, min(start + step, total)) for start in range(0, total, step)]


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
    # zeros from the mask itself: a traced graph would hold on to the batch of new ones
    bias = valid.float() * 0 if size is None else size.squeeze(-1).log()
    if valid is not None:
        bias = bias.masked_fill(~valid, float("-inf"))
    return bias[:, None, None, :]
