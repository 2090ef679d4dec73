"""timm's parallel blocks: attention and MLP side by side, or several of each side by side.

Read from timm 1.0.19 to 1.0.31. A block with one half only has no place between attention and MLP: methods that act
there act at its end.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

from ...core.method import BlockShape
from ...ops.attention import Heads
from ...ops.layer_macs import linear_macs
from ...ops.projections import linear_part
from ...ops.rows import split_dim
from ..block import BlockMacs, ReducingBlock
from .attention import (
    attention_macs,
    differential_lambda,
    differential_output,
    input_width,
    is_differential,
    split_heads,
    value_width,
)

try:  # timm >= 1.0.20
    from timm.models.vision_transformer import DiffParallelScalingBlock
except ImportError:
    DiffParallelScalingBlock = None


class _ParallelScaling(ReducingBlock):
    """Attention and MLP side by side from one input projection, rows [mlp hidden, q, k, v].

    There is no attention layer to call: the block spells the parts of an `AttentionLayer` itself.
    """

    output_reads_input = True  # the MLP runs beside attention, on the same input
    mlp_follows = False

    def attention_layers(self) -> tuple[Any, ...]:
        return (self,)

    def _project(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Outputs start..stop-1 of the input projection, with the bias as the installed timm adds it."""
        out = linear_part(self.in_proj, z, start, stop)
        qkv_bias = getattr(self, "qkv_bias", None)
        if qkv_bias is not None:  # timm < 1.0.20 lays zeros before the MLP's bias, although the MLP's rows come first
            return out + torch.cat((qkv_bias, self.mlp_bias))[start:stop]
        hidden = self.in_split[0]
        if self.mlp_bias is not None and start < hidden:
            return out + self.mlp_bias[start:stop]
        return out

    def attention_input(self, x: Tensor) -> Tensor:
        return self.in_norm(x)

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        hidden, dim = self.in_split[:2]
        parts = self._project(z, hidden, hidden + dim * (3 if with_values else 2)).split(dim, dim=2)
        if is_differential(self):  # norms act on [B, H, N, d]
            q, k = self.q_norm(split_heads(parts[0], self.head_dim)), self.k_norm(split_heads(parts[1], self.head_dim))
        else:  # norms act on [B, N, H, d], which matters for norms that look at more than the last axis
            q, k = (n(split_dim(p, 2, -1, self.head_dim)).transpose(1, 2) for n, p in zip(self._qk_norms(), parts))
        v = split_heads(parts[2], value_width(self)) if with_values else None
        dropout = self.attn_drop.p if self.training else 0.0
        return Heads(q, k, v, self.scale, differential_lambda(self, q), self.fused_attn, dropout, self.attn_drop)

    def _qk_norms(self) -> tuple[nn.Module, nn.Module]:
        return self.q_norm, self.k_norm

    def project_values(self, z: Tensor) -> Tensor:
        hidden, dim = self.in_split[:2]
        return split_heads(self._project(z, hidden + 2 * dim, hidden + 3 * dim), value_width(self))

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        out = differential_output(self, out)
        hidden = self.mlp_drop(self.mlp_act(self._project(z, 0, self.in_split[0])))
        if getattr(self, "out_proj", None) is not None:
            return self.out_proj(torch.cat((out, hidden), dim=-1))
        return self.attn_out_proj(out) + self.mlp_out_proj(hidden)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path(self.ls(outs[0]))

    def shape(self) -> BlockShape:
        return BlockShape(self.in_split[1], self.num_heads * (1 + is_differential(self)), self.head_dim)

    def macs(self) -> BlockMacs:
        hidden, dim = self.in_split[:2]
        pair = dim * (3 if is_differential(self) else 2)
        return BlockMacs(2 * dim * dim, dim * dim, pair, dim * dim + 2 * hidden * dim, 0)


class ReducingParallelScalingBlock(_ParallelScaling, ParallelScalingBlock):
    """`ParallelScalingBlock` (ViT-22B)."""


class ReducingParallelThingsBlock(ReducingBlock, ParallelThingsBlock):
    """Several attention layers side by side, then several MLPs; the heads of all layers stand together as signals.

    Each branch has a norm of its own, so what branches read is the residual stream itself.
    """

    def attention_layers(self) -> tuple[Any, ...]:
        return tuple(a.attn for a in self.attns)

    def layer_input(self, index: int, z: Tensor) -> Tensor:
        return self.attns[index].norm(z)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return torch.stack([a.drop_path(a.ls(y)) for a, y in zip(self.attns, outs)]).sum(dim=0)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return torch.stack([ffn(z) for ffn in self.ffns]).sum(dim=0)

    def shape(self) -> BlockShape:
        attn = self.attns[0].attn
        heads = attn.num_heads * (1 + is_differential(attn)) * len(self.attns)
        return BlockShape(input_width(attn), heads, attn.head_dim)

    def macs(self) -> BlockMacs:
        parts = [attention_macs(a.attn) for a in self.attns]
        return BlockMacs(*(sum(column) for column in zip(*parts)))._replace(mlp=linear_macs(self.ffns))


ReducingDiffParallelScalingBlock: type | None = None
if DiffParallelScalingBlock is not None:

    class ReducingDiffParallelScalingBlock(_ParallelScaling, DiffParallelScalingBlock):  # noqa: F811
        """`DiffParallelScalingBlock`: parallel block with differential attention."""
