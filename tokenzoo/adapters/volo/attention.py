"""VOLO's attention among all places, on tokens, and its class attention on fewer of them.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: tokens are rows [B, N, C] in place of maps [B, H, W, C], the
projection can be split, and the output takes fewer rows than there were keys.
"""

from __future__ import annotations

from timm.models.volo import Attention
from torch import Tensor, nn

from ...ops.attention import Heads, attend
from ...ops.layer_macs import linear_macs, linear_shapes, stream_width
from ...ops.projections import linear_part
from ..attending import AttentionLayer
from ..block import BlockMacs
from ..vit.attention import split_heads


def attention_width(attn: nn.Module) -> int:
    """Channels of all heads together."""
    return next(inputs for _, inputs, _ in linear_shapes(attn.proj))


def input_width(attn: nn.Module) -> int:
    """Channels of the residual stream."""
    width = attention_width(attn)
    return stream_width(attn, {"qkv": 3 * width}, width)


def attention_macs(attn: nn.Module) -> BlockMacs:
    """Multiply-adds of a layer alone (`mlp` is 0)."""
    width, dim = attention_width(attn), input_width(attn)
    return BlockMacs(2 * width * dim, width * dim, 2 * width, width * dim, 0)


class ReducingVoloAttention(AttentionLayer, Attention):
    """`Attention` of volo.py inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = attention_width(self)
        parts = linear_part(self.qkv, z, 0, width * (3 if with_values else 2)).split(width, dim=2)
        q, k, *v = (split_heads(part, width // self.num_heads) for part in parts)
        dropout = self.attn_drop.p if self.training else 0.0
        return Heads(
            q, k, v[0] if v else None, self.scale, fused=self.fused_attn, dropout=dropout, drop=self.attn_drop
        )

    def project_values(self, z: Tensor) -> Tensor:
        width = attention_width(self)
        return split_heads(linear_part(self.qkv, z, 2 * width, 3 * width), width // self.num_heads)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


def class_attention(attn: nn.Module, z: Tensor, bias: Tensor | None) -> Tensor:
    """`ClassAttention` with a bias of the keys: what the class token reads [B, 1, C].

    Args:
        attn: the layer.
        z: normed values of the class token and the patches [B, 1 + N, C].
        bias: of the keys [B, 1, 1, 1 + N], None for none.
    """
    k, v = (split_heads(part, attn.head_dim) for part in attn.kv(z).chunk(2, dim=2))
    q = split_heads(attn.q(z[:, :1]), attn.head_dim)
    out = attend(Heads(q, k, v, attn.scale, fused=False, drop=attn.attn_drop), bias)
    return attn.proj_drop(attn.proj(out))


def class_attention_macs(attn: nn.Module, n: int) -> int:
    """Multiply-adds of class attention that reads n tokens, the class token included."""
    per_token = linear_macs(attn.kv) + 2 * attn.num_heads * attn.head_dim
    return linear_macs(attn.q) + linear_macs(attn.proj) + n * per_token
