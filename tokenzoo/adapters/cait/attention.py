"""Queries, keys, values and output of CaiT's talking-heads attention.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projection can be split (queries and keys alone, values
alone), and the output takes fewer rows than there were keys. Talking heads mix whole maps, so these are written out in
the patched model too, by the same operations; with nothing removed the numbers are the same.
"""

from __future__ import annotations

from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn

from ...ops.attention import Heads
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
