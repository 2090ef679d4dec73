"""Queries, keys, values and output of ConViT's two attention layers: by content and place (`GPSA`), and plain (`MHSA`).

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projections can be split, the output takes fewer rows
than there were keys, and the map by place is that of the tokens that are left. Both layers write their map out, as
upstream; sizes, padding and masks are added to the logits of both maps of `GPSA`.
"""

from __future__ import annotations

import torch
from timm.models.convit import GPSA, MHSA
from torch import Tensor, nn

from ...ops.attention import Heads
from ...ops.layer_macs import linear_macs, linear_shapes, stream_width
from ...ops.placed import GatedPlaces
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
    projections = {"qk": 2 * width} if isinstance(attn, GPSA) else {"qkv": 3 * width}
    return stream_width(attn, projections, width)


def attention_macs(attn: nn.Module) -> BlockMacs:
    """Multiply-adds of a layer alone (`mlp` is 0), without the logits by place."""
    width, dim = attention_width(attn), input_width(attn)
    return BlockMacs(2 * width * dim, width * dim, 2 * width, width * dim, 0)


def place_macs(attn: nn.Module, places: int) -> int:
    """Multiply-adds of the logits by place among some places."""
    return linear_macs(attn.pos_proj) * places * places if isinstance(attn, GPSA) else 0


def relative_places(coords: Tensor) -> Tensor:
    """What `GPSA` knows of two places, for tokens at (row, column) [B, N, 2]: [B, N, N, 3]."""
    apart = coords.unsqueeze(1) - coords.unsqueeze(2)  # of the key, seen from the query
    return torch.cat([apart.flip(-1), apart.square().sum(-1, keepdim=True)], dim=-1)


class ReducingGPSA(AttentionLayer, GPSA):
    """`GPSA` inside a block that reduces tokens; `rows` are its logits by place [B or 1, H, N, N]."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = attention_width(self)
        q, k = (split_heads(part, width // self.num_heads) for part in self.qk(z).split(width, dim=2))
        placed = GatedPlaces(rows, self.gating_param.view(1, -1, 1, 1).sigmoid())
        v = self.project_values(z) if with_values else None
        return Heads(q, k, v, self.scale, fused=False, drop=self.attn_drop, placed=placed)

    def project_values(self, z: Tensor) -> Tensor:
        return split_heads(self.v(z), attention_width(self) // self.num_heads)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


class ReducingMHSA(AttentionLayer, MHSA):
    """`MHSA` inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = attention_width(self)
        parts = linear_part(self.qkv, z, 0, width * (3 if with_values else 2)).split(width, dim=2)
        q, k, *v = (split_heads(part, width // self.num_heads) for part in parts)
        return Heads(q, k, v[0] if v else None, self.scale, fused=False, drop=self.attn_drop)

    def project_values(self, z: Tensor) -> Tensor:
        width = attention_width(self)
        return split_heads(linear_part(self.qkv, z, 2 * width, 3 * width), width // self.num_heads)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


REDUCING_ATTENTIONS: dict[type, type] = {GPSA: ReducingGPSA, MHSA: ReducingMHSA}
