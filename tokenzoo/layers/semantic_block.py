"""Cross attention between semantic tokens and image tokens, in the parameter layout of STViT-R."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, Mlp, use_fused_attn
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops.attention import Heads, attend


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other rows, all of them or those that the window of a query sees.

    Rows are projected once and gathered afterwards, however many windows see them.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        qkv_bias: biases of `q` and `kv`.
        attn_drop: dropout of the attention map.
        proj_drop: dropout behind the projection.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"CrossAttention: {num_heads} heads do not divide {dim} channels; choose a divisor")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, rows: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Queries [B, n, C] read rows [B, m, C]; see `SemanticBlock`."""
        windows = 1 if seen is None else seen.shape[0]
        keys = self.kv(rows)  # [B, m, 2 C]
        if seen is not None:
            keys = keys.index_select(1, seen.flatten())
        # windows stand beside the heads, so that a bias is the same for all images and needs no copies
        k, v = keys.unflatten(2, (2, self.num_heads, -1)).unflatten(1, (windows, -1)).permute(3, 0, 1, 4, 2, 5)
        q = self.q(x).unflatten(2, (self.num_heads, -1)).unflatten(1, (windows, -1)).transpose(2, 3)
        if bias is not None:
            bias = bias.repeat_interleave(self.num_heads, 0)[None, :, None]  # [1, M * H, 1, K]
        dropout = self.attn_drop.p if self.training else 0.0
        q, k, v = (rows.flatten(1, 2).contiguous() for rows in (q, k, v))
        heads = Heads(q, k, v, self.scale, fused=self.fused_attn)
        out = attend(heads._replace(dropout=dropout), bias)  # [B, n / M, M * C]
        out = out.unflatten(2, (windows, -1)).transpose(1, 2).flatten(1, 2)
        return self.proj_drop(self.proj(out))


@register_notrace_module  # whether rows are gathered decides
class SemanticBlock(nn.Module):
    """Cross attention and MLP, each with a layer scale; queries and rows share a norm.

    Args:
        dim: channels C.
        num_heads: heads.
        mlp_ratio: hidden channels of the MLP over C.
        qkv_bias: biases of the projections to queries, keys and values.
        drop: dropout of the projections and of the MLP.
        attn_drop: dropout of the attention map.
        drop_path: stochastic depth.
        init_values: where layer scales start.
        shortcut: add the queries to what they read.
        norm_layer: norm of C channels.

    Source: Chang, Wang, Lin, Wang, Zhang, Jin, Shou, "Making Vision Transformers Efficient from A Token Sparsification
    View", CVPR 2023.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 1e-5,
        shortcut: bool = True,
        norm_layer: Any = nn.LayerNorm,
    ):
        super().__init__()
        self.shortcut = shortcut
        self.norm1 = norm_layer(dim)
        self.attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(init_values)))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor, rows: Tensor, seen: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Queries read rows.

        Args:
            x: queries [B, n, C]; with `seen`, those of the first window, then of the next, equally many of each.
            rows: what is read [B, m, C].
            seen: rows that each of M windows sees [M, K] int64; None for all.
            bias: added to the logits of these [M, K], or [1, m] without `seen`; None for nothing.

        Returns:
            [B, n, C], in the order of the queries.
        """
        read = self.drop_path(self.layer_scale_1 * self.attn(self.norm1(x), self.norm1(rows), seen, bias))
        x = x + read if self.shortcut else read
        return x + self.drop_path(self.layer_scale_2 * self.mlp(self.norm2(x)))
