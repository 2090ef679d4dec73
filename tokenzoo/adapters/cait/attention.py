"""Queries, keys, values and output of CaiT's talking-heads attention, and its class attention on fewer tokens.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projection can be split (queries and keys alone, values
alone), and the output takes fewer rows than there were keys. Talking heads mix whole maps, so these are written out in
the patched model too, by the same operations; with nothing removed the numbers are the same.
"""

from __future__ import annotations

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from ...ops.attention import Heads, attend
from ...ops.layer_macs import linear_macs, linear_shapes, stream_width
from ...ops.projections import linear_part
from ...ops.talking import Talk
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


def talking_macs(attn: nn.Module) -> BlockMacs:
    """Multiply-adds of a layer alone (`mlp` is 0); each pair is mixed over heads twice."""
    width, dim = attention_width(attn), input_width(attn)
    pair = 2 * width + linear_macs(attn.proj_l) + linear_macs(attn.proj_w)
    return BlockMacs(2 * width * dim, width * dim, pair, width * dim, 0)


class ReducingTalkingHeadAttn(AttentionLayer, TalkingHeadAttn):
    """`TalkingHeadAttn` inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = attention_width(self)
        parts = linear_part(self.qkv, z, 0, width * (3 if with_values else 2)).split(width, dim=2)
        q, k, *v = (split_heads(part, width // self.num_heads) for part in parts)
        talk = Talk(self.proj_l, self.proj_w)
        return Heads(q, k, v[0] if v else None, self.scale, fused=False, drop=self.attn_drop, talk=talk)

    def project_values(self, z: Tensor) -> Tensor:
        width = attention_width(self)
        return split_heads(linear_part(self.qkv, z, 2 * width, 3 * width), width // self.num_heads)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


def class_block(block: nn.Module, x: Tensor, class_token: Tensor, bias: Tensor | None) -> Tensor:
    """timm's `LayerScaleBlockClassAttn` with a bias of the keys.

    Args:
        block: the block.
        x: values of the patches that are left [B, N, C].
        class_token: [B, 1, C].
        bias: of all keys, the class token in front [B, 1, 1, 1 + N], None for none.
    """
    z = block.norm1(torch.cat((class_token, x), dim=1))
    class_token = class_token + block.drop_path(block.gamma_1 * _class_attention(block.attn, z, bias))
    return class_token + block.drop_path(block.gamma_2 * block.mlp(block.norm2(class_token)))


def _class_attention(attn: nn.Module, z: Tensor, bias: Tensor | None) -> Tensor:
    """What the class token reads of itself and the patches z [B, 1 + N, C]: [B, 1, C]."""
    rows = attn.q(z[:, 0]).unsqueeze(1), attn.k(z), attn.v(z)
    q, k, v = (split_heads(part, attention_width(attn) // attn.num_heads) for part in rows)
    dropout = attn.attn_drop.p if attn.training else 0.0
    heads = Heads(q, k, v, attn.scale, fused=attn.fused_attn, dropout=dropout, drop=attn.attn_drop)
    return attn.proj_drop(attn.proj(attend(heads, bias)))


def class_block_macs(block: nn.Module, n: int) -> int:
    """Multiply-adds of a class-attention block that reads n tokens, the class token included."""
    attn, width = block.attn, attention_width(block.attn)
    once = linear_macs(attn.q) + linear_macs(attn.proj) + linear_macs(block.mlp)
    return once + n * (linear_macs(attn.k) + linear_macs(attn.v) + 2 * width)
