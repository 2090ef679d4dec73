"""open_clip's `AttentionalPooler` on tokens that stand for several patches."""

from __future__ import annotations

from torch import Tensor, nn


def pool_by_attention(pool: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """open_clip's `AttentionalPooler` with a bias of the keys.

    Args:
        pool: the pooler.
        x: tokens [B, N, C].
        bias: [B, 1, 1, N] or None.

    Returns:
        One row per query of the pooler [B, Q, D].
    """
    x = pool.ln_k(x)
    q = pool.ln_q(pool.query).expand(x.shape[0], -1, -1)
    mask = None if bias is None else bias[:, 0, 0].to(q.dtype)
    return pool.attn(q, x, x, need_weights=False, key_padding_mask=mask)[0]


def pool_macs(pool: nn.Module, n: int) -> int:
    """Multiply-adds of a pooler over n tokens, for one image."""
    attn, queries = pool.attn, len(pool.query)
    width = attn.embed_dim
    keys = n * width * (attn.kdim + attn.vdim)
    return keys + queries * 2 * width * width + queries * n * 2 * width
