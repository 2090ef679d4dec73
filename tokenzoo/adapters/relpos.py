"""timm's vision_transformer_relpos.py: ViTs with a relative position bias instead of an absolute embedding.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks
(features, intermediates, logits), pooling knows sizes and padding, and intermediates in NCHW are lifted to the full
grid. The bias, a table (`RelPosBias`) or an MLP of log distances (`RelPosMlp`), of every block or shared by all,
follows the tokens: rows and columns of the places that are left.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from ..core.method import BlockShape
from ..core.recipe import Recipe
from ..core.tokens import Tokens
from ..ops.attention import Heads
from ..ops.layer_macs import linear_macs
from .attending import AttentionLayer
from .backbone import Family
from .block import BlockMacs, ReducingBlock
from .features import Reads
from .flow import Flow
from .heads import embed_macs
from .hooked import Aside
from .model import ReducingModel
from .refusals import refuse_unplaced
from .vit.attention import attention_heads, attention_macs, attention_values, input_width
from .vit.model import PreNorm, ResPost


def table_macs(bias: nn.Module | None) -> int:
    """Multiply-adds of making a bias: an MLP runs on every offset of two patches, a table costs nothing."""
    if not isinstance(bias, RelPosMlp):
        return 0
    high, wide = bias.window_size
    return (2 * high - 1) * (2 * wide - 1) * linear_macs(bias.mlp)


class ReducingRelPosAttention(AttentionLayer, RelPosAttention):
    """`RelPosAttention` inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        return attention_heads(self, z, with_values)

    def project_values(self, z: Tensor) -> Tensor:
        return attention_values(self, z)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


class _RelPos(ReducingBlock):
    """Both kinds of block; subclasses say where the norms are. What `rope` is elsewhere is the shared bias here."""

    def position_bias(self, rope: Tensor | None) -> Tensor | None:
        return rope if self.attn.rel_pos is None else self.attn.rel_pos.get_bias()

    def shape(self) -> BlockShape:
        return BlockShape(input_width(self.attn), self.attn.num_heads, self.attn.head_dim)

    def macs(self) -> BlockMacs:
        return attention_macs(self.attn)._replace(mlp=linear_macs(self.mlp))

    def cost(self, flow: Flow) -> int:
        return super().cost(flow) + table_macs(self.attn.rel_pos)

    def forward(
        self,
        x: Any,
        shared_rel_pos: Tensor | None = None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        aside: Aside | None = None,
    ) -> Any:
        return self.call(x, rope if shared_rel_pos is None else shared_rel_pos, attn_mask, is_causal, aside)


class ReducingRelPosBlock(PreNorm, _RelPos, RelPosBlock):
    """Pre-norm block with LayerScale and DropPath."""


class ReducingResPostRelPosBlock(ResPost, _RelPos, ResPostRelPosBlock):
    """Block with the norms on the branches."""


class ReducingVisionTransformerRelPos(ReducingModel, VisionTransformerRelPos):
    """`VisionTransformerRelPos` whose blocks reduce tokens."""

    reads_positions = True

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [B, N, C] behind the class token if there is one; positions are in the blocks."""
        return x if self.cls_token is None else torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        return self._pos_embed(self.patch_embed(x)), shared

    def embed_macs(self, grid: tuple[int, int]) -> int:
        return embed_macs(self.patch_embed, grid) + table_macs(self.shared_rel_pos)

    def head_reads(self) -> Reads:
        return Reads.of(self.global_pool)

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that these models cannot follow.

    Raises:
        ValueError: tokens are added, or merged ones placed between patches.
    """
    refuse_unplaced(model, recipe)


def check_block(block: nn.Module) -> nn.Module | None:
    """An attention layer, or a bias in it, that is of no known class; None if all are."""
    if type(block.attn) is not RelPosAttention:
        return block.attn
    bias = block.attn.rel_pos
    return None if bias is None or type(bias) in (RelPosBias, RelPosMlp) else bias


FAMILY = Family(
    name="vision_transformer_relpos",
    summary="timm vision_transformer_relpos.py: ViTs with a relative position bias",
    tried="timm 1.0.19 to 1.0.31",
    models={VisionTransformerRelPos: ReducingVisionTransformerRelPos},
    blocks={RelPosBlock: ReducingRelPosBlock, ResPostRelPosBlock: ReducingResPostRelPosBlock},
    attentions={RelPosAttention: ReducingRelPosAttention},
    check_recipe=check_recipe,
    check_block=check_block,
)
