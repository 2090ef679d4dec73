"""Hiera's block where attention is global: timm's `HieraBlock` and `MaskUnitAttention` on tokens.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projection can be split, and the output takes fewer rows
than there were keys. Blocks that pool queries, and those that attend inside of mask units, run as they are.
"""

from __future__ import annotations

from timm.models.hiera import HieraBlock, MaskUnitAttention
from torch import Tensor, nn

from ...core.method import BlockShape
from ...ops.attention import Heads
from ...ops.layer_macs import linear_macs, stream_width
from ...ops.projections import linear_part
from ..attending import AttentionLayer
from ..block import ReducingBlock
from ..vit.attention import split_heads
from ..vit.model import PreNorm


class ReducingGlobalAttention(AttentionLayer, MaskUnitAttention):
    """`MaskUnitAttention` among all places, inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = self.heads * self.head_dim
        qkv = self.qkv(z) if with_values else linear_part(self.qkv, z, 0, 2 * width)
        q, k, *v = (split_heads(part, self.head_dim) for part in qkv.split(width, dim=2))
        return Heads(q, k, v[0] if v else None, self.scale, fused=self.fused_attn)

    def project_values(self, z: Tensor) -> Tensor:
        width = self.heads * self.head_dim
        return split_heads(linear_part(self.qkv, z, 2 * width, 3 * width), self.head_dim)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj(out)


class ReducingHieraBlock(PreNorm, ReducingBlock, HieraBlock):
    """`HieraBlock` without pooling, on tokens."""

    def shape(self) -> BlockShape:
        return BlockShape(input_width(self.attn), self.attn.heads, self.attn.head_dim)


def input_width(attn: nn.Module) -> int:
    """Channels of the residual stream in front of a layer."""
    width = attn.heads * attn.head_dim
    return stream_width(attn, {"qkv": 3 * width}, width)


def whole_block_macs(block: nn.Module, places: int) -> int:
    """Multiply-adds of a block that runs as it is, pooling or not, in mask units or among all places.

    Args:
        block: timm's `HieraBlock`.
        places: that enter it.
    """
    attn = block.attn
    left = places // attn.q_stride
    keys = attn.q_stride * attn.window_size if attn.use_mask_unit_attn else places
    total = linear_macs(attn.qkv) * places + 2 * attn.heads * attn.head_dim * left * keys
    total += (linear_macs(attn.proj) + linear_macs(block.mlp)) * left
    return total + (linear_macs(block.proj) * places if block.proj is not None else 0)
