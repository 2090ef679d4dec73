"""timm's convit.py: ConViT, whose first blocks attend by content and by place; the class token enters behind these.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks, for
features, intermediates and logits; pooling knows sizes and padding; intermediates in NCHW are lifted to the full grid.
Logits by place are gathered for the tokens that are left: a merged token stands where the one that heads it stood, one
without a place (a fused rest) has the mean over all patches. With `merged_positions="mean"` they are made anew from the
mass-weighted mean coordinates. In front of the last blocks the class token joins the patches that are left
(`core.joining`), and blocks behind it see a ViT; methods that read class attention have none before that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.convit import GPSA, Block, ConVit
from torch import Tensor, nn

from ...core.joining import fronted_layout, join_front
from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import linear_macs
from ...ops.projections import cast_for
from ..backbone import Family
from ..block import BlockMacs, ReducingBlock
from ..flow import Flow
from ..masks import gather_places
from ..model import ReducingModel
from .attention import REDUCING_ATTENTIONS, attention_macs, attention_width, input_width, place_macs, relative_places


class ReducingConVitBlock(ReducingBlock, Block):
    """Pre-norm block of both kinds."""

    fused = False

    def rotations(self, tokens: Tokens, rope: Tensor | None) -> Tensor | None:
        """Logits by the places of the tokens as they are now [B or 1, H, N, N]; None in blocks that look at none."""
        if not self.use_gpsa:
            return None
        if rope is None:  # called by hand
            rope = relative_to(self.attn, tokens.layout.num_patches, tokens.x.device)
        if tokens.coords is not None and tokens.positions is not None:
            rope = relative_places(tokens.coords).to(rope.dtype)
            return self.attn.pos_proj(rope).permute(0, 3, 1, 2)
        return gather_places(self.attn.pos_proj(rope).permute(0, 3, 1, 2), tokens)

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path(outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path(self.mlp(z))

    def shape(self) -> BlockShape:
        heads = self.attn.num_heads
        return BlockShape(input_width(self.attn), heads, attention_width(self.attn) // heads)

    def macs(self) -> BlockMacs:
        return attention_macs(self.attn)._replace(mlp=linear_macs(self.mlp))

    def cost(self, flow: Flow) -> int:
        mean = flow.recipe is not None and flow.recipe.merged_positions == "mean"
        return super().cost(flow) + place_macs(self.attn, flow.projected if mean else flow.layout.num_patches)


def relative_to(attn: GPSA, count: int, device: torch.device) -> Tensor:
    """What `GPSA` knows of all pairs of patches [1, N, N, 3], as the layer has kept it of a call, or made anew."""
    kept = attn.rel_indices
    if kept is not None and kept.shape[1] == count:
        return cast_for(attn.pos_proj, kept)
    index, side = torch.arange(count, device=device), math.isqrt(count)
    coords = torch.stack([index.div(side, rounding_mode="floor"), index % side], dim=-1).float()
    return cast_for(attn.pos_proj, relative_places(coords.unsqueeze(0)))


class ReducingConVit(ReducingModel, ConVit):
    """`ConVit` whose blocks reduce tokens."""

    num_prefix_tokens = 1  # older releases of timm lack the attribute
    reads_positions = True
    takes_added = False

    @property
    def _late(self) -> bool:
        """Whether the class token joins in front of a block behind the first one."""
        return self.cls_token is not None and self.local_up_to_layer > 0

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        (layout,) = super().sequences(grid, recipe).values()
        if not self._late:
            return {0: layout}
        bare = layout._replace(num_prefix=0, has_class=False)
        joined = fronted_layout(bare, 1, True)._replace(joined=1)
        return {0: bare, self.local_up_to_layer: joined}

    def head_layout(self, layout: Layout) -> Layout:
        return fronted_layout(layout, 1, True) if self._late and not layout.num_prefix else layout

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        layout = super().layout(grid, rope)
        if self.tokenzoo_recipe.merged_positions == "mean":
            layout = layout._replace(track_size=True)  # mean coordinates are weighted by it
        return layout

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, Any]:
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} takes no attn_mask: its class token enters behind some blocks, so that no mask "
                "fits all of them; call the model without one"
            )
        return super().start(x, None, trace, dense)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self._pos_embed(self.patch_embed(x))
        if self.cls_token is not None and not self._late:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if not self.blocks[0].use_gpsa:
            return x, None
        return x, relative_to(self.blocks[0].attn, int(x.shape[1]), x.device)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(x + self.pos_embed if self.use_pos_embed else x)

    def restart(self, tokens: Tokens, index: int, context: Any) -> Tokens:
        if not self._late or index != self.local_up_to_layer:
            return tokens
        return join_front(tokens, self.cls_token.expand(tokens.x.shape[0], -1, -1), has_class=True)

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
        ValueError: a class token that never enters; a grid that is not square, whose places timm gets wrong.
    """
    name, high, wide = type(model).__name__, *model.patch_embed.grid_size
    if model.cls_token is not None and model.local_up_to_layer >= len(model.blocks):
        raise ValueError(
            f"{name}.local_up_to_layer={model.local_up_to_layer}: with {len(model.blocks)} blocks the class token "
            "never enters; build the model with fewer blocks that attend by place"
        )
    if high != wide and model.local_up_to_layer > 0:
        raise ValueError(
            f"{name}: attention by place takes every grid for a square one, and this one has {high} x {wide} patches; "
            "use square images"
        )


FAMILY = Family(
    name="convit",
    summary="timm convit.py: ConViT",
    tried="timm 1.0.19 to 1.0.31",
    models={ConVit: ReducingConVit},
    blocks={Block: ReducingConVitBlock},
    attentions=REDUCING_ATTENTIONS,
    check=check,
)
