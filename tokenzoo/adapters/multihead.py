"""torch's `nn.MultiheadAttention` inside blocks: that of torchvision's and open_clip's encoders.

Differences from upstream: `out_proj` is called, so that hooks and adapters on it act (torch reads its weight instead),
and attention always runs through `scaled_dot_product_attention`. The input projection is a bare parameter of the layer:
it is read at every call, so that whatever replaces it for one (adapters that merge themselves) acts as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.method import BlockShape
from ..ops.attention import Heads
from ..ops.layer_macs import unwrapped
from ..ops.rows import split_dim
from .attending import AttentionLayer


class ReducingMultiheadAttention(AttentionLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        q, k, v = (*projected(self, z, 0, 3 if with_values else 2), None)[:3]
        return Heads(q, k, v, self.head_dim**-0.5, dropout=self.dropout if self.training else 0.0)

    def project_values(self, z: Tensor) -> Tensor:
        return projected(self, z, 2, 3)[0]

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.out_proj(out)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *args: Any,
        attend: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Called by a block as torch's layer is, with `attend` on top; by hand, the layer as it was before patching.

        Args:
            query: what the layer reads [B, N, C].
            key: the same.
            value: the same.
            *args: arguments of the layer itself.
            attend: given by the block: takes the layer and what it reads.
            **kwargs: arguments of the layer itself.

        Raises:
            ValueError: a hook made queries, keys and values differ.
        """
        if attend is None:
            return super().forward(query, key, value, *args, **kwargs)
        if not (key is query and value is query) and not torch.compiler.is_compiling():
            # what casts arguments (mixed precision of shards) gives three tensors of the same values
            if not (torch.equal(query, key) and torch.equal(query, value)):
                raise ValueError(
                    "a hook gave queries, keys and values of an attention layer different inputs, which tokens that "
                    "are reduced between them cannot follow; let it change all three alike, or hook the norm in front"
                )
        return attend(self, query), None


def projected(layer: nn.Module, z: Tensor, start: int, stop: int) -> list[Tensor]:
    """Queries, keys and values start..stop-1 (of 0, 1, 2) of a layer with one packed input projection [B, H, N, D].

    Args:
        layer: with parameters `in_proj_weight` [3 * C, C] and `in_proj_bias` [3 * C] or None, and `num_heads`.
        z: what it reads [B, N, C].
        start: first of the three.
        stop: behind the last of them.
    """
    weight, bias, width = layer.in_proj_weight, layer.in_proj_bias, z.shape[2]
    if stop - start < 3:
        weight = weight[start * width : stop * width]
        bias = None if bias is None else bias[start * width : stop * width]
    parts = F.linear(z, weight, bias).split(width, dim=2)
    return [split_dim(part, 2, layer.num_heads, -1).transpose(1, 2) for part in parts]


def call_multihead(layer: nn.Module, z: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """Calls a layer, or what is wrapped around it, as encoders do: self-attention, no map asked for."""
    return layer(z, z, z, need_weights=False, attend=attend)[0]


def multihead_shape(layer: nn.Module) -> BlockShape:
    """Sizes of a layer for cost formulas."""
    layer = unwrapped(layer)
    return BlockShape(layer.embed_dim, layer.num_heads, layer.head_dim)


def check_multihead(layer: nn.Module, name: str) -> None:
    """Refuses settings of a layer that no vision encoder of these libraries has.

    Args:
        layer: the layer.
        name: of the layer, for the message.

    Raises:
        ValueError: batches not in front, widths of keys or values of their own, keys and values added, or zeros.
    """
    found = {
        "batch_first=False": not layer.batch_first,
        "kdim or vdim": not layer._qkv_same_embed_dim,
        "add_bias_kv=True": layer.bias_k is not None,
        "add_zero_attn=True": layer.add_zero_attn,
    }
    given = [option for option, there in found.items() if there]
    if given:
        raise ValueError(
            f"{name} is an nn.MultiheadAttention with {' and '.join(given)}; tokens are reduced in those without, as "
            "torchvision and open_clip build them"
        )


REDUCING_MULTIHEAD: dict[type, type] = {nn.MultiheadAttention: ReducingMultiheadAttention}
