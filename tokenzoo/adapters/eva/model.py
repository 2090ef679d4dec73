"""timm's eva.py: EVA, EVA-02, ROPE-ViT, Perception Encoder, DINOv3 and relatives.

Differences from upstream: the model's subclass owns the loop over the blocks (features, intermediates, logits), pooling
knows sizes and padding, and intermediates in NCHW are lifted to the full grid. Rotary embeddings follow the tokens: a
token is rotated by the row of its original position, a merged one by that of the token it merged into, and one without
a place (a fused rest) not at all; `merged_positions="mean"` rotates every token by its mass-weighted mean coordinate
instead. Blocks called by hand with timm's plain table always gather rows. Patch dropout and causal attention are
refused by name.
"""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.attention import key_bias
from ...ops.layer_macs import linear_macs
from ..backbone import Family
from ..block import BlockMacs, ReducingBlock
from ..features import Reads
from ..hooked import Aside
from ..model import ReducingModel
from ..pooling import pool_plain
from .attention import REDUCING_ATTENTIONS, head_width, input_width, rotary_macs
from .rope import Rope, check_rebuild, waves_of


class RotaryBlock(ReducingBlock):
    """A block that gathers the rows of its tokens; subclasses say where the norms are."""

    def rotations(self, tokens: Tokens, rope: Rope | None) -> Tensor | None:
        return None if rope is None else rope.rows(tokens)

    def shape(self) -> BlockShape:
        return BlockShape(input_width(self.attn), self.attn.num_heads, head_width(self.attn))

    def macs(self) -> BlockMacs:
        return rotary_macs(self.attn)._replace(mlp=linear_macs(self.mlp))

    def forward(
        self,
        x: Any,
        rope: Any = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        aside: Aside | None = None,
    ) -> Any:
        x = x if aside is None else aside.given(x, self.tokenzoo.name)
        if rope is not None and not isinstance(rope, Rope):  # called by hand, with timm's own table
            if rope.dim() > 3:
                raise ValueError(
                    f"rope has shape {tuple(rope.shape)}; give [N, 2D] or [H, N, 2D], one table for all images: the "
                    "block gathers the rows of each image itself"
                )
            layout = self.tokenzoo.layout
            rope = Rope.of(rope, layout.num_prefix)
            if not isinstance(x, Tokens):
                layout.check_length(x.shape[1], self.tokenzoo.name)
                x = Tokens(x, layout._replace(standalone=True, track_positions=True))
        tokens = self.call(x, rope, attn_mask, is_causal)
        return tokens if aside is None else aside.left(tokens)


class ReducingEvaBlock(RotaryBlock, EvaBlock):
    """Pre-norm block; either layer scale may be absent."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        y = outs[0]
        return self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        y = self.mlp(z)
        return self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class ReducingEvaBlockPostNorm(RotaryBlock, EvaBlockPostNorm):
    """Block with the norms on the branches; queries and keys come from the residual stream itself."""

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(self.norm1(outs[0]))

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(z)))


class RotaryModel(ReducingModel):
    """A model whose blocks rotate queries and keys by one of timm's tables."""

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        layout = super().layout(grid, rope)
        if rope is not None and rope.waves is not None:
            layout = layout._replace(track_size=True)  # mean coordinates are weighted by it
        return layout


class ReducingEva(RotaryModel, Eva):
    """`Eva` whose blocks reduce tokens."""

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        grid = tuple(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        x, table = self._pos_embed(self.patch_embed(x))
        if table is None:
            return self.norm_pre(x), None
        waves = waves_of(self.rope, grid) if self.tokenzoo_recipe.merged_positions == "mean" else None
        # one table a block in mixed mode: those get their leading rows when their block comes
        rope = Rope(table, waves) if self.rope_mixed else Rope.of(table, self.num_protected, waves)
        return self.norm_pre(x), rope

    def rope_of(self, rope: Any, index: int) -> Any:
        if rope is None or not self.rope_mixed:
            return rope
        waves = None if rope.waves is None else rope.waves._replace(freqs=rope.waves.freqs[:, index])
        return Rope.of(rope.table[index], self.num_protected, waves)

    def head_reads(self) -> Reads:
        return Reads.of(self.global_pool) if self.attn_pool is None else Reads(attends=True)

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        recipe = self.tokenzoo_recipe
        if self.attn_pool is None:
            return pool_plain(tokens, kind, include_prefix=False, mass_weighted=recipe.mass_weighted_pool)
        bias = key_bias(tokens.size if recipe.proportional else None, tokens.valid)  # prefix tokens are pooled too
        bias = bias if tokens.gate is None else tokens.gate.bias(bias)
        return self.attn_pool(tokens.x, attn_mask=None if bias is None else bias.to(tokens.x.dtype))


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: patch dropout is on.
    """
    if model.patch_drop is not None:
        raise ValueError(
            f"{type(model).__name__}.patch_drop drops random patches before block 0; set model.patch_drop = None (or "
            "create the model with patch_drop_rate=0) before patching"
        )


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that this model cannot follow.

    Raises:
        ValueError: rotary tables have to be rebuilt from mean coordinates but cannot be.
    """
    if recipe.merged_positions == "mean" and model.rope is not None:
        check_rebuild(model.rope, model.patch_embed.grid_size)


FAMILY = Family(
    name="eva",
    tried="timm 1.0.19 to 1.0.31",
    summary="timm eva.py: EVA, EVA-02, ROPE-ViT, Perception Encoder (PE), DINOv3, LingBot-Vision, Sapiens2",
    models={Eva: ReducingEva},
    blocks={EvaBlock: ReducingEvaBlock, EvaBlockPostNorm: ReducingEvaBlockPostNorm},
    attentions=REDUCING_ATTENTIONS,
    check=check,
    check_recipe=check_recipe,
)
