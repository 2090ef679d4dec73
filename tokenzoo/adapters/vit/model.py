"""timm's vision_transformer.py: ViT, DeiT, DeiT-3, CLIP, SigLIP, DINOv2, AIMv2, hybrids, ...

Differences from upstream: the model's subclass owns the loop over the blocks (features, intermediates, logits), pooling
knows sizes and padding, and intermediates in NCHW are lifted to the full grid. Parallel blocks have one half only, so
methods that act between attention and MLP act at their end. Patch dropout and causal attention are refused by name.
"""

from __future__ import annotations

from typing import Any

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

from ...core.method import BlockShape
from ...core.tokens import Tokens
from ...ops.attention import Heads, attend, key_bias
from ...ops.layer_macs import linear_macs
from ..backbone import Family
from ..block import BlockMacs, ReducingBlock
from ..features import Reads
from ..model import ReducingModel
from ..pooling import pool_plain
from .attention import REDUCING_ATTENTIONS, attention_macs, input_width, is_differential, split_heads
from .parallel import (
    DiffParallelScalingBlock,
    ReducingDiffParallelScalingBlock,
    ReducingParallelScalingBlock,
    ReducingParallelThingsBlock,
)


class _OneAttention(ReducingBlock):
    """A block with one attention layer `attn` and one `mlp`; subclasses say where the norms are."""

    def shape(self) -> BlockShape:
        attn = self.attn
        return BlockShape(input_width(attn), attn.num_heads * (1 + is_differential(attn)), attn.head_dim)

    def macs(self) -> BlockMacs:
        return attention_macs(self.attn)._replace(mlp=linear_macs(self.mlp))


class PreNorm:
    """Mixin of pre-norm blocks with LayerScale and DropPath."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(self.ls1(outs[0]))

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(z)))


class ResPost:
    """Mixin of blocks with the norms on the branches; queries and keys come from the residual stream itself."""

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(self.norm1(outs[0]))

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(z)))


class ReducingVitBlock(PreNorm, _OneAttention, Block):
    """Pre-norm block with LayerScale and DropPath."""


class ReducingResPostBlock(ResPost, _OneAttention, ResPostBlock):
    """Block with the norms on the branches."""


class VitModel(ReducingModel):
    """The model side of the family."""

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.norm_pre(self._pos_embed(self.patch_embed(x))), None

    def head_reads(self) -> Reads:
        if self.attn_pool is None:
            return Reads.of(self.global_pool, self.pool_include_prefix)
        latent = isinstance(self.attn_pool, AttentionPoolLatent)
        return Reads(attends=True, mean=not latent and self.attn_pool.pool == "avg")

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        if self.attn_pool is None:
            return pool_plain(tokens, kind, self.pool_include_prefix, self.tokenzoo_recipe.mass_weighted_pool)
        first = 0 if self.pool_include_prefix else tokens.layout.own_prefix
        x = tokens.x[:, first:]
        size = tokens.size[:, first:] if tokens.size is not None and self.tokenzoo_recipe.proportional else None
        valid = None if tokens.valid is None else tokens.valid[:, first:]
        bias, latent = key_bias(size, valid), isinstance(self.attn_pool, AttentionPoolLatent)
        if tokens.gate is not None:
            bias = tokens.gate._replace(open=tokens.gate.open[:, first:]).bias(bias, itself=not latent)
        if latent:
            return self.attn_pool(x, attn_mask=None if bias is None else bias.to(x.dtype))
        return _refine_and_pool(self.attn_pool, x, bias, tokens, self.tokenzoo_recipe.mass_weighted_pool)


def _refine_and_pool(pool: nn.Module, x: Tensor, bias: Tensor | None, tokens: Tokens, mass_weighted: bool) -> Tensor:
    """timm's `AttentionPoolPrr` with a bias of the keys: self-attention without parameters, then pooling."""
    heads = split_heads(pool.pre_norm(x), pool.head_dim)
    x = pool.post_norm(attend(Heads(heads, heads, heads, pool.scale, fused=pool.fused_attn), bias))
    return pool_plain(tokens._replace(x=x), pool.pool, include_prefix=True, mass_weighted=mass_weighted)


class ReducingVisionTransformer(VitModel, VisionTransformer):
    """`VisionTransformer` whose blocks reduce tokens."""


class ReducingVisionTransformerDistilled(VitModel, VisionTransformerDistilled):
    """DeiT with a distillation token: the heads read tokens 0 and 1, no pooling."""

    def head_reads(self) -> Reads:
        return Reads()

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


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [("blocks", model.blocks, "hook the blocks one by one (model.blocks[i])")]
    for index, block in enumerate(model.blocks):
        for order, layer in enumerate(getattr(block, "attns", ())):
            name = f"blocks.{index}.attns.{order}"
            found.append((name, layer, "hook its parts (norm, attn, ls, drop_path)"))
    pool = getattr(model, "attn_pool", None)
    if pool is not None and not isinstance(pool, AttentionPoolLatent):
        found.append(("attn_pool", pool, "hook its norms (attn_pool.pre_norm, attn_pool.post_norm)"))
    return found


BLOCKS: dict[type, type] = {
    Block: ReducingVitBlock,
    ResPostBlock: ReducingResPostBlock,
    ParallelScalingBlock: ReducingParallelScalingBlock,
    ParallelThingsBlock: ReducingParallelThingsBlock,
}
if ReducingDiffParallelScalingBlock is not None:
    BLOCKS[DiffParallelScalingBlock] = ReducingDiffParallelScalingBlock

FAMILY = Family(
    name="vision_transformer",
    tried="timm 1.0.19 to 1.0.31",
    summary="timm vision_transformer.py and deit.py: ViT, DeiT, DeiT-3, CLIP, SigLIP, DINOv2, AIMv2, BEiT-3, FlexiViT",
    models={
        VisionTransformer: ReducingVisionTransformer,
        VisionTransformerDistilled: ReducingVisionTransformerDistilled,
    },
    blocks=BLOCKS,
    attentions=REDUCING_ATTENTIONS,
    check=check,
    bypassed=bypassed,
)
