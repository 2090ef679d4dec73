"""timm's cait.py: CaiT, whose class token enters behind the blocks that methods act in; see `late_class`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks, for
features, intermediates and logits; pooling knows sizes and padding; intermediates in NCHW are lifted to the full grid.
"""

from __future__ import annotations

import torch
from timm.models.cait import Cait, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from torch import Tensor, nn

from ...core.method import BlockShape
from ...ops.layer_macs import linear_macs
from ..backbone import Family
from ..block import BlockMacs, ReducingBlock
from ..late_class import LateClassModel, bypassed_class_blocks, class_attention, refuse_other_class_blocks
from .attention import ReducingTalkingHeadAttn, attention_width, input_width, talking_macs


class ReducingLayerScaleBlock(ReducingBlock, LayerScaleBlock):
    """Pre-norm block with LayerScale, among patches alone."""

    fused = False

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path(self.gamma_1 * outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path(self.gamma_2 * self.mlp(z))

    def shape(self) -> BlockShape:
        attn, heads = self.attn, self.attn.num_heads
        return BlockShape(input_width(attn), heads, attention_width(attn) // heads, linear_macs(attn.proj_l))

    def macs(self) -> BlockMacs:
        return talking_macs(self.attn)._replace(mlp=linear_macs(self.mlp))


class ReducingCait(LateClassModel, Cait):
    """`Cait` whose blocks reduce tokens."""

    class_blocks = "blocks_token_only"

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        return self._pos_embed(self.patch_embed(x)), None

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(x + self.pos_embed)

    def run_class_block(self, block: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
        own = tokens[:, :1]
        own = own + block.drop_path(block.gamma_1 * class_attention(block.attn, block.norm1(tokens), bias))
        own = own + block.drop_path(block.gamma_2 * block.mlp(block.norm2(own)))
        return torch.cat((own, tokens[:, 1:]), dim=1)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: class-attention blocks of other classes than timm's own.
    """
    refuse_other_class_blocks(model, ReducingCait.class_blocks, LayerScaleBlockClassAttn)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    blocks = ("blocks", model.blocks, "hook the blocks one by one (model.blocks[i])")
    return [blocks, *bypassed_class_blocks(model, ReducingCait.class_blocks)]


FAMILY = Family(
    name="cait",
    summary="timm cait.py: CaiT; its class-attention blocks stay",
    tried="timm 1.0.19 to 1.0.31",
    models={Cait: ReducingCait},
    blocks={LayerScaleBlock: ReducingLayerScaleBlock},
    attentions={TalkingHeadAttn: ReducingTalkingHeadAttn},
    check=check,
    bypassed=bypassed,
)
