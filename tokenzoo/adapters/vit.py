"""timm's vision_transformer.py: ViT, DeiT, DeiT-3, CLIP, SigLIP, DINOv2, AIMv2, hybrids, ...

Differences from upstream: the model's subclass owns the loop over the blocks (features, intermediates, logits), pooling
knows sizes and padding, and intermediates in NCHW are lifted to the full grid. Parallel blocks have one half only, so
methods that act between attention and MLP act at their end. Patch dropout and causal attention are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from ..attention import Heads, attend, key_bias
from ..methods.base import BlockShape
from ..tokens import Tokens
from .base import BlockMacs, ReducingBlock, ReducingModel, pool_plain
from .family import Family, linear_macs
from .vit_attention import (
    ATTENTIONS,
    attention_heads,
    attention_macs,
    attention_output,
    attention_values,
    differential_lambda,
    differential_output,
    is_differential,
    linear_part,
    split_heads,
    value_width,
)

try:  # timm >= 1.0.20
    from timm.models.vision_transformer import DiffParallelScalingBlock
except ImportError:
    DiffParallelScalingBlock = None


class _OneAttention(ReducingBlock):
    """A block with one attention layer `attn` and one `mlp`; subclasses say where the norms are."""

    def _normed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def heads(self, tokens: Tokens, rope: Any) -> Heads:
        return attention_heads(self.attn, self._normed(tokens.x))

    def query_keys(self, tokens: Tokens, rope: Any) -> Heads:
        return attention_heads(self.attn, self._normed(tokens.x), with_values=False)

    def values(self, x: Tensor) -> Tensor:
        return attention_values(self.attn, self._normed(x))

    def _branch(self, x: Tensor, out: Tensor) -> Tensor:
        gated = getattr(self.attn, "gate", None) is not None
        return attention_output(self.attn, out, self._normed(x) if gated else x)

    def shape(self) -> BlockShape:
        attn = self.attn
        return BlockShape(attn.qkv.in_features, attn.num_heads * (1 + is_differential(attn)), attn.head_dim)

    def macs(self) -> BlockMacs:
        return attention_macs(self.attn)._replace(mlp=linear_macs(self.mlp))

    @property
    def fused(self) -> bool:
        return self.attn.fused_attn

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Any = None) -> Any:
        return self.call(x, rope, attn_mask, is_causal)


class ReducingVitBlock(_OneAttention, Block):
    """Pre-norm block with LayerScale and DropPath."""

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def close_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(self._branch(x, out)))

    def close_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducingResPostBlock(_OneAttention, ResPostBlock):
    """Block with the norms on the branches; queries and keys come from the residual stream itself."""

    def _normed(self, x: Tensor) -> Tensor:
        return x

    def close_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.norm1(self._branch(x, out)))

    def close_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class _ParallelScaling(ReducingBlock):
    """Attention and MLP side by side from one input projection, rows [mlp hidden, q, k, v]."""

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs start..stop-1 of the input projection, with the bias as the installed timm adds it."""
        out = linear_part(self.in_proj, self.in_norm(x), start, stop)
        qkv_bias = getattr(self, "qkv_bias", None)
        if qkv_bias is not None:  # timm < 1.0.20 lays zeros before the MLP's bias, although the MLP's rows come first
            return out + torch.cat((qkv_bias, self.mlp_bias))[start:stop]
        hidden = self.in_split[0]
        if self.mlp_bias is not None and start < hidden:
            return out + self.mlp_bias[start:stop]
        return out

    def _heads(self, x: Tensor, with_values: bool) -> Heads:
        hidden, dim = self.in_split[:2]
        parts = self._project(x, hidden, hidden + dim * (3 if with_values else 2)).split(dim, dim=2)
        if is_differential(self):  # norms act on [B, H, N, d]
            q, k = self.q_norm(split_heads(parts[0], self.head_dim)), self.k_norm(split_heads(parts[1], self.head_dim))
        else:  # norms act on [B, N, H, d], which matters for norms that look at more than the last axis
            q, k = (n(p.unflatten(2, (-1, self.head_dim))).transpose(1, 2) for n, p in zip(self._qk_norms(), parts))
        v = split_heads(parts[2], value_width(self)) if with_values else None
        dropout = self.attn_drop.p if self.training else 0.0
        return Heads(q, k, v, self.scale, differential_lambda(self, q), self.fused_attn, dropout)

    def _qk_norms(self) -> tuple[nn.Module, nn.Module]:
        return self.q_norm, self.k_norm

    def heads(self, tokens: Tokens, rope: Any) -> Heads:
        return self._heads(tokens.x, with_values=True)

    def query_keys(self, tokens: Tokens, rope: Any) -> Heads:
        return self._heads(tokens.x, with_values=False)

    def values(self, x: Tensor) -> Tensor:
        hidden, dim = self.in_split[:2]
        return split_heads(self._project(x, hidden + 2 * dim, hidden + 3 * dim), value_width(self))

    def close_attention(self, x: Tensor, out: Tensor) -> Tensor:
        out = differential_output(self, out)
        hidden = self.mlp_drop(self.mlp_act(self._project(x, 0, self.in_split[0])))
        if getattr(self, "out_proj", None) is not None:
            y = self.out_proj(torch.cat((out, hidden), dim=-1))
        else:
            y = self.attn_out_proj(out) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(y))

    def close_mlp(self, x: Tensor) -> Tensor:
        return x  # the MLP ran beside attention

    def shape(self) -> BlockShape:
        return BlockShape(self.in_split[1], self.num_heads * (1 + is_differential(self)), self.head_dim)

    def macs(self) -> BlockMacs:
        hidden, dim = self.in_split[:2]
        pair = dim * (3 if is_differential(self) else 2)
        return BlockMacs(2 * dim * dim, dim * dim, pair, dim * dim + 2 * hidden * dim, 0)

    @property
    def fused(self) -> bool:
        return self.fused_attn

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Any = None) -> Any:
        return self.call(x, rope, attn_mask, is_causal)


class ReducingParallelScalingBlock(_ParallelScaling, ParallelScalingBlock):
    """`ParallelScalingBlock` (ViT-22B)."""


class ReducingParallelThingsBlock(ReducingBlock, ParallelThingsBlock):
    """Several attention layers side by side, then several MLPs; the heads of all layers stand together as signals."""

    def _all(self, x: Tensor, with_values: bool) -> Heads:
        parts = [attention_heads(a.attn, a.norm(x), with_values) for a in self.attns]
        first = parts[0]
        joined = {name: torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("q", "k")}
        v = torch.cat([p.v for p in parts], dim=1) if with_values else None
        lam = None
        if first.lam is not None:  # one factor a layer, broadcast over its heads
            heads = first.q.shape[1] // 2
            lam = torch.cat([p.lam.expand(heads) for p in parts]).view(1, -1, 1, 1)
        return first._replace(v=v, lam=lam, **joined)

    def heads(self, tokens: Tokens, rope: Any) -> Heads:
        return self._all(tokens.x, with_values=True)

    def query_keys(self, tokens: Tokens, rope: Any) -> Heads:
        return self._all(tokens.x, with_values=False)

    def values(self, x: Tensor) -> Tensor:
        return torch.cat([attention_values(a.attn, a.norm(x)) for a in self.attns], dim=1)

    def close_attention(self, x: Tensor, out: Tensor) -> Tensor:
        branches = []
        for layer, part in zip(self.attns, out.chunk(len(self.attns), dim=2)):
            gated = getattr(layer.attn, "gate", None) is not None
            y = attention_output(layer.attn, part, layer.norm(x) if gated else x)
            branches.append(layer.drop_path(layer.ls(y)))
        return x + torch.stack(branches).sum(dim=0)

    def close_mlp(self, x: Tensor) -> Tensor:
        return x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)

    def shape(self) -> BlockShape:
        attn = self.attns[0].attn
        heads = attn.num_heads * (1 + is_differential(attn)) * len(self.attns)
        return BlockShape(attn.qkv.in_features, heads, attn.head_dim)

    def macs(self) -> BlockMacs:
        parts = [attention_macs(a.attn) for a in self.attns]
        return BlockMacs(*(sum(column) for column in zip(*parts)))._replace(mlp=linear_macs(self.ffns))

    @property
    def fused(self) -> bool:
        return self.attns[0].attn.fused_attn

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Any = None) -> Any:
        return self.call(x, rope, attn_mask, is_causal)


class _VitModel(ReducingModel):
    """The model side of the family."""

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.norm_pre(self._pos_embed(self.patch_embed(x))), None

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        if self.attn_pool is None:
            return pool_plain(tokens, kind, self.pool_include_prefix, self.tokenzoo_recipe.mass_weighted_pool)
        first = 0 if self.pool_include_prefix else tokens.layout.num_prefix
        x = tokens.x[:, first:]
        size = tokens.size[:, first:] if tokens.size is not None and self.tokenzoo_recipe.proportional else None
        valid = None if tokens.valid is None else tokens.valid[:, first:]
        bias = key_bias(size, valid)
        if isinstance(self.attn_pool, AttentionPoolLatent):
            return self.attn_pool(x, attn_mask=None if bias is None else bias.to(x.dtype))
        return _refine_and_pool(self.attn_pool, x, bias, tokens, self.tokenzoo_recipe.mass_weighted_pool)


def _refine_and_pool(pool: nn.Module, x: Tensor, bias: Tensor | None, tokens: Tokens, mass_weighted: bool) -> Tensor:
    """timm's `AttentionPoolPrr` with a bias of the keys: self-attention without parameters, then pooling."""
    heads = split_heads(pool.pre_norm(x), pool.head_dim)
    x = pool.post_norm(attend(Heads(heads, heads, heads, pool.scale, fused=pool.fused_attn), bias))
    return pool_plain(tokens._replace(x=x), pool.pool, include_prefix=True, mass_weighted=mass_weighted)


class ReducingVisionTransformer(_VitModel, VisionTransformer):
    """`VisionTransformer` whose blocks reduce tokens."""


class ReducingVisionTransformerDistilled(_VitModel, VisionTransformerDistilled):
    """DeiT with a distillation token: the heads read tokens 0 and 1, no pooling."""

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x.x if isinstance(x, Tokens) else x, pre_logits)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: patch dropout is on.
    """
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(
            f"{type(model).__name__}.patch_drop drops random patches before block 0 and forgets which; set "
            "model.patch_drop = torch.nn.Identity() (or create the model with patch_drop_rate=0) before patching"
        )


def check_block(block: nn.Module) -> nn.Module | None:
    """The attention layer of a block that is no exactly known class, None if all are served."""
    layers = [block.attn] if hasattr(block, "attn") else [a.attn for a in getattr(block, "attns", ())]
    return next((layer for layer in layers if type(layer) not in ATTENTIONS), None)


BLOCKS: dict[type, type] = {
    Block: ReducingVitBlock,
    ResPostBlock: ReducingResPostBlock,
    ParallelScalingBlock: ReducingParallelScalingBlock,
    ParallelThingsBlock: ReducingParallelThingsBlock,
}
if DiffParallelScalingBlock is not None:

    class ReducingDiffParallelScalingBlock(_ParallelScaling, DiffParallelScalingBlock):
        """`DiffParallelScalingBlock`: parallel block with differential attention."""

    BLOCKS[DiffParallelScalingBlock] = ReducingDiffParallelScalingBlock

FAMILY = Family(
    name="vision_transformer",
    summary="timm vision_transformer.py and deit.py: ViT, DeiT, DeiT-3, CLIP, SigLIP, DINOv2, AIMv2, BEiT-3, FlexiViT",
    models={
        VisionTransformer: ReducingVisionTransformer,
        VisionTransformerDistilled: ReducingVisionTransformerDistilled,
    },
    blocks=BLOCKS,
    check=check,
    check_block=check_block,
)
