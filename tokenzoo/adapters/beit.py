"""timm's beit.py: BEiT and BEiT v2.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks
(features, intermediates, logits), pooling knows sizes and padding, and intermediates in NCHW are lifted to the full
grid. The relative position bias, of every block or shared by all, follows the tokens: rows and columns of the places
that are left. It costs what it costs unpatched while nothing is reduced; behind a reduction every image has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from ..core.method import BlockShape
from ..core.recipe import Recipe
from ..core.tokens import Tokens
from ..ops.attention import Heads
from ..ops.layer_macs import linear_macs
from .attending import AttentionLayer
from .backbone import Family
from .block import BlockMacs, ReducingBlock
from .eva.attention import fused_part, head_width, input_width, query_width
from .features import Reads
from .hooked import Aside
from .model import ReducingModel
from .refusals import refuse_unplaced
from .vit.attention import split_heads


class ReducingBeitAttention(AttentionLayer, Attention):
    """`Attention` of beit.py inside a block that reduces tokens: biases of queries and values, none of keys."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        dim, width = query_width(self), head_width(self)
        parts = fused_part(self, z, 0, dim * (3 if with_values else 2)).split(dim, dim=2)
        q, k, *v = (split_heads(part, width) for part in parts)
        dropout = self.attn_drop.p if self.training else 0.0
        values = v[0] if with_values else None
        return Heads(q, k, values, self.scale, fused=self.fused_attn, dropout=dropout, drop=self.attn_drop)

    def project_values(self, z: Tensor) -> Tensor:
        dim = query_width(self)
        return split_heads(fused_part(self, z, 2 * dim, 3 * dim), head_width(self))

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


class ReducingBeitBlock(ReducingBlock, Block):
    """Pre-norm block; the layer scales may be absent. What `rope` is elsewhere is the shared bias [H, N, N] here."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def position_bias(self, rope: Tensor | None) -> Tensor | None:
        shared = rope if rope is None or rope.dim() == 4 else rope.unsqueeze(0)
        if self.attn.relative_position_bias_table is None:
            return shared
        own = self.attn._get_rel_pos_bias()
        return own if shared is None else own + shared

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        y = outs[0]
        return self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        y = self.mlp(z)
        return self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)

    def shape(self) -> BlockShape:
        return BlockShape(input_width(self.attn), self.attn.num_heads, head_width(self.attn))

    def macs(self) -> BlockMacs:
        width, dim = query_width(self.attn), input_width(self.attn)
        return BlockMacs(2 * width * dim, width * dim, 2 * width, width * dim, linear_macs(self.mlp))

    def forward(
        self,
        x: Any,
        shared_rel_pos_bias: Tensor | None = None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        aside: Aside | None = None,
    ) -> Any:
        return self.call(x, rope if shared_rel_pos_bias is None else shared_rel_pos_bias, attn_mask, is_causal, aside)


class ReducingBeit(ReducingModel, Beit):
    """`Beit` whose blocks reduce tokens."""

    @property
    def reads_positions(self) -> bool:
        return _is_placed(self)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Class token and positions, if there are any, around patches [B, N, C]."""
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return self._pos_embed(self.patch_embed(x)), shared

    def head_reads(self) -> Reads:
        return Reads.of(self.global_pool)

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)


def _is_placed(model: nn.Module) -> bool:
    """Whether attention adds a bias by position."""
    tables = (block.attn.relative_position_bias_table for block in model.blocks)
    return model.rel_pos_bias is not None or any(table is not None for table in tables)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that this model cannot follow.

    Raises:
        ValueError: there is a relative position bias, and tokens are added or merged ones placed between patches.
    """
    if _is_placed(model):
        refuse_unplaced(model, recipe)


FAMILY = Family(
    name="beit",
    summary="timm beit.py: BEiT, BEiT v2",
    tried="timm 1.0.19 to 1.0.31",
    models={Beit: ReducingBeit},
    blocks={Block: ReducingBeitBlock},
    attentions={Attention: ReducingBeitAttention},
    check_recipe=check_recipe,
)
