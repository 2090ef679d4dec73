"""timm's cait.py: CaiT, whose class token enters behind the blocks that methods act in.

Differences from upstream: the model's subclass owns the loop over the blocks (features, intermediates, logits), pooling
knows sizes and padding, and intermediates in NCHW are lifted to the full grid. Blocks see patches alone, so methods
that read the attention of a class token use what patches receive from each other, as in any model without one. The
class-attention blocks run on the patches that are left: with proportional attention they add log sizes, padding and
hidden patches are no keys. Behind them the class token stands in front, as in a ViT.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn
from torch import Tensor, nn

from ...core.joining import fronted_layout, join_front
from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.attention import key_bias
from ...ops.layer_macs import linear_macs
from ..backbone import Family
from ..block import BlockMacs, ReducingBlock
from ..classes import path_of
from ..flow import Flow
from ..model import ReducingModel
from ..walk import Beside
from .attention import (
    ReducingTalkingHeadAttn,
    TalkingHeadAttn,
    attention_width,
    class_block,
    class_block_macs,
    input_width,
    talking_macs,
)


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


class ReducingCait(ReducingModel, Cait):
    """`Cait` whose blocks reduce tokens."""

    # ---- the sequence: patches alone, until the class token joins them

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        (layout,) = super().sequences(grid, recipe).values()
        return {0: layout._replace(num_prefix=layout.added, has_class=False)}

    def head_layout(self, layout: Layout) -> Layout:
        return layout if self.blocks_token_only is None else fronted_layout(layout, 1, True)

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        return self._pos_embed(self.patch_embed(x)), None

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(x + self.pos_embed)

    def behind_blocks(self, tokens: Tokens) -> Tokens:
        if self.blocks_token_only is None:  # taken off with the head
            return tokens
        bias = self._class_bias(tokens)
        class_token = self.cls_token.expand(tokens.x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            class_token = class_block(block, tokens.x, class_token, bias)
        return join_front(tokens, class_token, has_class=True)

    def _class_bias(self, tokens: Tokens) -> Tensor | None:
        """Bias of the keys of class attention, the class token's own in front [B, 1, 1, 1 + N]."""
        size = tokens.size if self.tokenzoo_recipe.proportional else None
        seen = tokens.valid if tokens.visible is None else tokens.visible
        if tokens.gate is not None and seen is not None:
            seen = seen | tokens.gate.closed  # these are not hidden, their gates say what they count
        bias = key_bias(size, seen)
        bias = bias if tokens.gate is None else tokens.gate.bias(bias)
        return None if bias is None else F.pad(bias, (1, 0))

    # ---- ends

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        if index + 1 < len(self.blocks) or self.blocks_token_only is None:
            return []
        rows, n = [], flow.left
        for order, block in enumerate(self.blocks_token_only):
            rows.append(Beside(f"blocks_token_only.{order}", n, flow.left + 1, class_block_macs(block, flow.left + 1)))
            n = flow.left + 1
        return rows

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifier.
        """
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: class-attention blocks of other classes than timm's own.
    """
    for index, block in enumerate(model.blocks_token_only or ()):
        for name, part, known in (("", block, LayerScaleBlockClassAttn), (".attn", block.attn, ClassAttn)):
            if type(part) is not known:
                raise ValueError(
                    f"blocks_token_only.{index}{name} is {path_of(type(part))}, and sizes and padding of tokens can be "
                    f"told to {path_of(known)} alone; build the model with that class"
                )


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [("blocks", model.blocks, "hook the blocks one by one (model.blocks[i])")]
    for index, block in enumerate(model.blocks_token_only or ()):
        found.append((f"blocks_token_only.{index}", block, "hook its parts (norm1, attn.proj, norm2, mlp)"))
        found.append((f"blocks_token_only.{index}.attn", block.attn, "hook its parts (q, k, v, proj)"))
    return found


FAMILY = Family(
    name="cait",
    summary="timm cait.py: CaiT; its class-attention blocks stay",
    models={Cait: ReducingCait},
    blocks={LayerScaleBlock: ReducingLayerScaleBlock},
    attentions={TalkingHeadAttn: ReducingTalkingHeadAttn},
    check=check,
    bypassed=bypassed,
)
