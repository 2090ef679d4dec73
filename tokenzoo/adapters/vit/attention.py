"""Queries, keys, values and output of timm's plain attention layers: `Attention` and `DiffAttention`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projection can be split (queries and keys alone, values
alone), and the output takes fewer rows than there were keys. `q_norm`, `k_norm`, the scale norm, the gate, a head width
other than dim / heads, dropout and `fused_attn` are honoured.
"""

from __future__ import annotations

from timm.layers import Attention
from torch import Tensor, nn

from ...ops.attention import Heads
from ...ops.layer_macs import stream_width
from ...ops.projections import linear_part
from ...ops.rows import split_dim
from ..attending import AttentionLayer
from ..block import BlockMacs

try:  # timm >= 1.0.20
    from timm.layers import DiffAttention
except ImportError:
    DiffAttention = None


def is_differential(attn: nn.Module) -> bool:
    """Whether an attention layer (or block that holds one itself) subtracts a second map."""
    return hasattr(attn, "lambda_init")


def attention_width(attn: nn.Module) -> int:
    """Channels of all query heads together."""
    return attn.num_heads * value_width(attn)


def input_width(attn: nn.Module) -> int:
    """Channels of the residual stream."""
    width = attention_width(attn)
    return stream_width(attn, {"qkv": 3 * width}, width)


def split_heads(x: Tensor, width: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return split_dim(x, 2, -1, width).transpose(1, 2)


def differential_lambda(attn: nn.Module, like: Tensor) -> Tensor | None:
    """The factor of the second map, None for ordinary attention."""
    return attn._compute_lambda().type_as(like) if is_differential(attn) else None


def attention_heads(attn: nn.Module, x: Tensor, with_values: bool = True) -> Heads:
    """Heads of normed tokens x [B, N, C]."""
    width = attention_width(attn)
    qkv = attn.qkv(x) if with_values else linear_part(attn.qkv, x, 0, 2 * width)
    parts = qkv.split(width, dim=2)
    q = attn.q_norm(split_heads(parts[0], attn.head_dim))
    k = attn.k_norm(split_heads(parts[1], attn.head_dim))
    v = split_heads(parts[2], value_width(attn)) if with_values else None
    dropout = attn.attn_drop.p if attn.training else 0.0
    return Heads(q, k, v, attn.scale, differential_lambda(attn, q), attn.fused_attn, dropout, attn.attn_drop)


def attention_values(attn: nn.Module, x: Tensor) -> Tensor:
    """Values of normed tokens x [B, N, C] -> [B, H, N, Dv]."""
    width = attention_width(attn)
    return split_heads(linear_part(attn.qkv, x, 2 * width, 3 * width), value_width(attn))


def value_width(attn: nn.Module) -> int:
    """Width of a value head."""
    return attn.head_dim * (2 if is_differential(attn) else 1)


def differential_output(attn: nn.Module, out: Tensor) -> Tensor:
    """The per-head norm of differential attention on heads side by side; ordinary heads pass unchanged."""
    if not is_differential(attn):
        return out
    heads = attn.sub_norm(split_dim(out, 2, -1, value_width(attn)))
    return (heads * (1 - attn.lambda_init)).flatten(2)


def attention_output(attn: nn.Module, out: Tensor, z: Tensor | None) -> Tensor:
    """Output projection of heads out [B, N, H * Dv]; z [B, N, C] are the inputs of these rows, read by a gate only."""
    out = attn.norm(differential_output(attn, out))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        out = out * gate(z).sigmoid()
    return attn.proj_drop(attn.proj(out))


def attention_macs(attn: nn.Module) -> BlockMacs:
    """Multiply-adds of an attention layer alone (`mlp` is 0)."""
    width, dim = attention_width(attn), input_width(attn)
    # differential attention multiplies both maps with values of double width
    pair = width + width * (2 if is_differential(attn) else 1)
    return BlockMacs(2 * width * dim, width * dim, pair, output_macs(attn, width, dim), 0)


def output_macs(attn: nn.Module, width: int, dim: int) -> int:
    """Multiply-adds a token behind attention: output projection and gate."""
    return width * dim * (1 if getattr(attn, "gate", None) is None else 2)


class _ReducingAttention(AttentionLayer):
    """Both layers of timm's that are called with tokens alone."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        return attention_heads(self, z, with_values)

    def project_values(self, z: Tensor) -> Tensor:
        return attention_values(self, z)

    @property
    def output_reads_input(self) -> bool:
        return getattr(self, "gate", None) is not None

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return attention_output(self, out, z)


class ReducingAttention(_ReducingAttention, Attention):
    """`Attention` inside a block that reduces tokens."""


REDUCING_ATTENTIONS: dict[type, type] = {Attention: ReducingAttention}
if DiffAttention is not None:

    class ReducingDiffAttention(_ReducingAttention, DiffAttention):
        """`DiffAttention` inside a block that reduces tokens."""

    REDUCING_ATTENTIONS[DiffAttention] = ReducingDiffAttention
