"""Queries, keys, values and output of the attention layers of timm's eva.py: `EvaAttention` and `AttentionRope`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projection can be split (queries and keys alone, values
alone), the output takes fewer rows than there were keys, and rotary rows may differ from image to image. Honoured are
fused and separate projections, biases of queries and values only (also when added separately), `q_norm` and `k_norm`,
grouped key and value heads, both pairings of rotary channels, the scale norm, the gate, a head width other than
dim / heads, dropout and `fused_attn`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ...ops.attention import Heads
from ...ops.layer_macs import linear_shapes, stream_width
from ...ops.projections import is_plain, linear_part
from ..attending import AttentionLayer
from ..block import BlockMacs
from ..vit.attention import attention_output, output_macs, split_heads
from .rope import rotate


def head_width(attn: nn.Module) -> int:
    """Width of a head."""
    if hasattr(attn, "head_dim"):
        return attn.head_dim
    return next(inputs for _, inputs, _ in linear_shapes(attn.proj)) // attn.num_heads  # timm < 1.0.20


def query_width(attn: nn.Module) -> int:
    """Channels of all query heads together."""
    return attn.num_heads * head_width(attn)


def input_width(attn: nn.Module) -> int:
    """Channels of the residual stream."""
    width = query_width(attn)
    return stream_width(attn, {"q_proj": width} if attn.qkv is None else {"qkv": 3 * width}, width)


def key_width(attn: nn.Module) -> int:
    """Channels of all key heads together; fewer than those of the queries when heads share keys."""
    return getattr(attn, "num_kv_heads", attn.num_heads) * head_width(attn)


def fused_part(attn: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """Outputs start..stop-1 of the fused projection, with the bias as the layer adds it."""
    if getattr(attn, "q_bias", None) is None:  # AttentionRope has an ordinary bias
        return linear_part(attn.qkv, x, start, stop)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))[start:stop]
    if attn.qkv_bias_separate:
        return linear_part(attn.qkv, x, start, stop) + bias
    if is_plain(attn.qkv):
        return F.linear(x, attn.qkv.weight[start:stop], bias)
    return _changed_part(attn.qkv, x, start, stop, bias)


def _changed_part(qkv: nn.Module, x: Tensor, start: int, stop: int, bias: Tensor) -> Tensor:
    """Outputs of a changed fused projection plus a bias, where timm's layer reads its weight instead of calling it.

    Raises:
        ValueError: an adapter around the projection, which has no effect on the unpatched model.
    """
    weight = getattr(qkv, "weight", None)
    if not isinstance(weight, Tensor) or weight.device != x.device:  # timm's own layer fails on such a module
        return linear_part(qkv, x, start, stop) + bias
    if not isinstance(qkv, nn.Linear):
        raise ValueError(
            f"qkv is a {type(qkv).__module__}.{type(qkv).__qualname__} around a weight: timm's fused attention with "
            "biases of its own reads the weight and skips what is around it, so an adapter would have no effect; set "
            "attn.qkv_bias_separate = True on every block, which makes timm and tokenzoo call it, or merge the adapter"
        )
    return F.linear(x, weight)[..., start:stop] + bias  # parametrised, or a tensor of another class


def _share(attn: nn.Module, x: Tensor) -> Tensor:
    """Keys or values of grouped heads repeated for every query head [B, H, N, D]."""
    groups = attn.num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def rotary_heads(attn: nn.Module, x: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
    """Heads of normed tokens.

    Args:
        attn: the layer.
        x: [B, N, C].
        rows: rotations [..., N, 2D], those of prefix tokens included, or None.
        with_values: project the values too.
    """
    width, v = head_width(attn), None
    if attn.qkv is not None:
        dim = query_width(attn)
        parts = fused_part(attn, x, 0, dim * (3 if with_values else 2)).split(dim, dim=2)
        q, k = split_heads(parts[0], width), split_heads(parts[1], width)
        v = split_heads(parts[2], width) if with_values else None
    else:
        q, k = split_heads(attn.q_proj(x), width), split_heads(attn.k_proj(x), width)
        v = split_heads(attn.v_proj(x), width) if with_values else None
    dtype = q.dtype  # also that of the values; norms and tables may be wider
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rows is not None:
        half = getattr(attn, "rotate_half", False)  # timm < 1.0.20 pairs neighbours only
        q, k = rotate(q, rows, half).to(dtype), rotate(k, rows, half).to(dtype)
    v = None if v is None else _share(attn, v)
    dropout = attn.attn_drop.p if attn.training else 0.0
    return Heads(q, _share(attn, k), v, attn.scale, fused=attn.fused_attn, dropout=dropout, drop=attn.attn_drop)


def rotary_values(attn: nn.Module, x: Tensor) -> Tensor:
    """Values of normed tokens x [B, N, C] -> [B, H, N, D]."""
    if attn.qkv is not None:
        dim = query_width(attn)
        return split_heads(fused_part(attn, x, 2 * dim, 3 * dim), head_width(attn))
    return _share(attn, split_heads(attn.v_proj(x), head_width(attn)))


def rotary_macs(attn: nn.Module) -> BlockMacs:
    """Multiply-adds of an attention layer alone (`mlp` is 0); rotations are no products with weights."""
    queries, keys, dim = query_width(attn), key_width(attn), input_width(attn)
    return BlockMacs((queries + keys) * dim, keys * dim, 2 * queries, output_macs(attn, queries, dim), 0)


class _ReducingRotary(AttentionLayer):
    """Both layers that rotate queries and keys."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        return rotary_heads(self, z, rows, with_values)

    def project_values(self, z: Tensor) -> Tensor:
        return rotary_values(self, z)

    @property
    def output_reads_input(self) -> bool:
        return getattr(self, "gate", None) is not None

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return attention_output(self, out, z)


class ReducingEvaAttention(_ReducingRotary, EvaAttention):
    """`EvaAttention` inside a block that reduces tokens."""


class ReducingAttentionRope(_ReducingRotary, AttentionRope):
    """`AttentionRope` inside a block that reduces tokens."""


REDUCING_ATTENTIONS: dict[type, type] = {EvaAttention: ReducingEvaAttention, AttentionRope: ReducingAttentionRope}
