"""LeViT's block on tokens: attention with a bias by the places of query and key, norms inside of the layers.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the output takes fewer rows than there were keys, and the
bias is gathered for the tokens that are left. Projections are called with their batch norm and not split, so a method
that acts ahead of attention projects everything twice. Maps are written out, as upstream.
"""

from __future__ import annotations

from typing import Any

from timm.models.levit import Attention, LevitBlock
from torch import Tensor, nn

from ...core.method import BlockShape
from ...ops.attention import Heads
from ...ops.layer_macs import linear_macs, linear_shapes
from ..attending import AttentionLayer
from ..block import BlockMacs, ReducingBlock
from ..flow import Flow


class ReducingLevitAttention(AttentionLayer, Attention):
    """`Attention` of levit.py inside a block that reduces tokens."""

    def _parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, H, N, ...]; rows of the projection go by head."""
        heads = self.qkv(z).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return heads.split([self.key_dim, self.key_dim, self.val_dim], dim=3)

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        q, k, v = self._parts(z)
        return Heads(q, k, v if with_values else None, self.scale, fused=False)

    def project_values(self, z: Tensor) -> Tensor:
        return self._parts(z)[2]

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj(out)


class ReducingLevitBlock(ReducingBlock, LevitBlock):
    """`LevitBlock` on tokens."""

    fused = False

    def position_bias(self, rope: Any) -> Tensor:
        return self.attn.attention_biases[:, self.attn.attention_bias_idxs].unsqueeze(0)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(outs[0])

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(z))

    def shape(self) -> BlockShape:
        return BlockShape(input_width(self.attn), self.attn.num_heads, self.attn.key_dim)

    def macs(self) -> BlockMacs:
        attn, dim = self.attn, input_width(self.attn)
        keys, values = attn.key_attn_dim, attn.val_attn_dim
        return BlockMacs(2 * keys * dim, values * dim, keys + values, values * dim, linear_macs(self.mlp))

    def overhead(self, flow: Flow) -> int:
        macs = self.macs()
        total = (macs.qk + macs.v) * flow.looked
        if any(step.method.place == "ahead" for step, _, _ in flow.steps):
            total += macs.v * flow.projected + macs.qk * flow.values
        return total


def input_width(attn: nn.Module) -> int:
    """Channels of the residual stream."""
    return next(inputs for _, inputs, _ in linear_shapes(attn.qkv))
