"""Blocks of SViT's stages with plain attention, on tokens: the depthwise convolutions go back to the grid.

Differences from upstream: attention, norms and the 1 x 1 convolutions run on the tokens that are left. In front of a
depthwise convolution every place of the grid gets the value of the token it belongs to, dropped ones what the recipe's
`fill` says, and what the convolution adds goes back to the tokens through the same maps. The convolution inside the MLP
reads hidden values: with fill "stash" those of dropped tokens are what the MLP makes of the value they had.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.lift import lift
from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...core.tokens import Tokens
from ...layers.chunks import at_once
from ...layers.pointwise import PointwiseConv
from ...layers.super_token import MapAttention, SuperTokenAttention
from ...models.svit.blocks import SuperTokenBlock
from ...ops.attention import Heads
from ...ops.projections import is_plain, pointwise
from ...ops.rows import split_dim
from ..attending import AttentionLayer
from ..block import BlockMacs, BlockPlan, ReducingBlock, refuse_alone
from ..flow import Flow
from ..hooked import Aside
from ..merging import Merging
from ..on_grid import from_map, on_grid, to_map
from ..places import Places, places_of
from ..refusals import refuse_symbols
from .costs import attention_macs, grid_macs, kernel_macs
from .layouts import sequence_layout
from .token_norm import norm_alike, norm_tokens


def begin(x: Tensor, recipe: Recipe, scores: tuple[Tensor | None, ...] = (None,), standalone: bool = False) -> Tokens:
    """A new sequence: all places of a map [B, C, H, W].

    Args:
        x: the map.
        recipe: decides which side data is tracked.
        scores: importance that each method which carries one has of these places.
        standalone: the blocks were called without their model.
    """
    grid = int(x.shape[2]), int(x.shape[3])  # the tracer hands sizes out as tensors
    layout = sequence_layout(grid, recipe, standalone)
    return Tokens(from_map(x), layout, trace=(), scores=scores[0], more_scores=scores[1:])


def full_map(tokens: Tokens, recipe: Recipe) -> Tensor:
    """The map [B, C, H, W] of tokens, every place with the value of the token it belongs to."""
    return to_map(lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill), tokens.layout.grid)


class ReducingMapAttention(AttentionLayer, MapAttention):
    """`MapAttention` on tokens, inside a block that reduces them."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        parts = self._projected(z, 0, 3 if with_values else 2)
        return Heads(parts[0], parts[1], parts[2] if with_values else None, self.scale, fused=self.fused_attn)

    def project_values(self, z: Tensor) -> Tensor:
        return self._projected(z, 2, 3)[0]

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return _pointwise(self.proj, out)

    def _projected(self, z: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Queries, keys and values number start..stop-1 of rows z: each [B, H, N, D]. Rows go by head."""
        if not is_plain(self.qkv, PointwiseConv):
            rows = split_dim(pointwise(self.qkv, z), 2, self.num_heads, 3, -1)
            return rows.transpose(1, 2).unbind(3)[start:stop]
        weight, bias = self.qkv.weight.flatten(1), self.qkv.bias
        if (start, stop) != (0, 3):
            weight = weight.unflatten(0, (self.num_heads, 3, -1))[:, start:stop].flatten(0, 2)
            bias = None if bias is None else bias.unflatten(0, (self.num_heads, 3, -1))[:, start:stop].flatten()
        rows = split_dim(nn.functional.linear(z, weight, bias), 2, self.num_heads, stop - start, -1)
        return rows.transpose(1, 2).unbind(3)


class ReducingSuperTokenAttention(AttentionLayer, SuperTokenAttention):
    """`SuperTokenAttention` of single tokens, inside a block that reduces them: the layer within does it all."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        return self.stoken_refine.project(z, rows, with_values)

    def project_values(self, z: Tensor) -> Tensor:
        return self.stoken_refine.project_values(z)

    def forward(self, x: Tensor, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """Tokens [B, N, C] where a block says how they attend, else a map [B, C, H, W]."""
        return SuperTokenAttention.forward(self, x) if attend is None else self.stoken_refine(x, attend=attend)


REDUCING_ATTENTIONS: dict[type, type] = {
    SuperTokenAttention: ReducingSuperTokenAttention,
    MapAttention: ReducingMapAttention,
}


class ReducingSuperTokenBlock(ReducingBlock, SuperTokenBlock):
    """`SuperTokenBlock` with plain attention on tokens; called with a map it does what the model would."""

    tokenzoo: BlockPlan
    tokenzoo_recipe: Recipe
    reads_recipe = True  # such blocks go back to the full map themselves

    def forward(self, x: Tensor | Tokens, rope: None = None, attn_mask: None = None, aside: Aside | None = None) -> Any:
        """Tokens to tokens; a map (blocks called without their model) is taken by the first block of a stage, and
        handed back by the last one."""
        if aside is not None:
            return aside.left(self.forward(aside.given(x, self.tokenzoo.name)))
        if not isinstance(x, Tokens):
            refuse_symbols(self, x)
            refuse_alone(self.tokenzoo)
            x = begin(x, self.tokenzoo_recipe, standalone=True)
        tokens = self.run(x)
        if tokens.layout.standalone and self.tokenzoo.index == self.tokenzoo.depth - 1:
            return full_map(tokens, self.tokenzoo_recipe)
        return tokens

    # ---- the halves

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1.norm(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(_scaled(outs[0], self.gamma_1))

    @property
    def fused(self) -> bool:
        return self.attn.stoken_refine.fused_attn

    def shape(self) -> BlockShape:
        attn = self.attn.stoken_refine
        return BlockShape(attn.num_heads * attn.head_dim, attn.num_heads, attn.head_dim)

    def macs(self) -> BlockMacs:
        return attention_macs(self.attn, self.mlp2)

    def cost(self, flow: Flow) -> int:
        return super().cost(flow) + kernel_macs(self.shape().dim, self.mlp2.hidden, flow)

    def overhead(self, flow: Flow) -> int:
        return super().overhead(flow) + grid_macs(self.shape().dim, self.mlp2.hidden, flow)

    # ---- the flow

    def run(self, tokens: Tokens, rope: Any = None, mask: Tensor | None = None) -> Tokens:
        """One block on tokens: positions by a convolution, then the usual flow with an MLP that sees the grid."""
        return super().run(self._positioned(tokens), rope, mask)

    def _positioned(self, tokens: Tokens) -> Tokens:
        """Tokens with what the positional convolution adds."""
        if not tokens.trace:
            return tokens._replace(x=from_map(self.pos_embed(to_map(tokens.x, tokens.layout.grid))))
        places = places_of(tokens.trace, self.tokenzoo_recipe.fill, tokens.x.dtype)
        y = self._convolved(self.pos_embed.conv, tokens.x, tokens, lambda rows: rows, places)
        return tokens._replace(x=tokens.x + y)

    def _transform(self, tokens: Tokens, merging: Merging) -> Tokens:
        """The MLP half."""
        merge, z = merging.enter("mlp", tokens, partial(norm_tokens, self.norm2, valid=tokens.valid))
        if merge is None and not tokens.trace:
            y = from_map(self.mlp2(to_map(z, tokens.layout.grid)))
        elif merge is None:
            y = self._mlp_by_images(z, tokens)
        else:
            u = self._first_half(z)
            added = self._convolved(self.mlp2.conv.conv, merge.lift(u), tokens, partial(self._hidden, tokens))
            y = merge.lift(self._second_half(u + merge.apply(added)))
        return tokens._replace(x=tokens.x + self.drop_path2(_scaled(y, self.gamma_2)))

    def _mlp_by_images(self, z: Tensor, tokens: Tokens) -> Tensor:
        """The MLP on reduced tokens, as many images at a time as the model's own MLP takes."""
        conv, through = self.mlp2.conv.conv, partial(self._hidden, tokens)
        places = places_of(tokens.trace, self.tokenzoo_recipe.fill, z.dtype)

        def run(z: Tensor, places: Places | None) -> Tensor:
            u = self._first_half(z)
            return self._second_half(u + self._convolved(conv, u, tokens, through, places))

        step = at_once(z, tokens.layout.num_patches * self.mlp2.hidden, self.training)
        if places is None or step >= z.shape[0]:
            return run(z, places)
        starts = range(0, z.shape[0], step)
        return torch.cat([run(z[start : start + step], places.part(start, start + step)) for start in starts])

    def _first_half(self, z: Tensor) -> Tensor:
        return self.mlp2.act(_pointwise(self.mlp2.fc1, z))

    def _second_half(self, u: Tensor) -> Tensor:
        return self.mlp2.drop(_pointwise(self.mlp2.fc2, u))

    def _hidden(self, tokens: Tokens, rows: Tensor) -> Tensor:
        """Hidden values of the MLP for other rows of the residual stream."""
        return self._first_half(norm_alike(self.norm2, rows, tokens.x, tokens.valid))

    def _convolved(
        self,
        conv: nn.Conv2d,
        values: Tensor,
        tokens: Tokens,
        through: Callable[[Tensor], Tensor],
        places: Places | None = None,
    ) -> Tensor:
        """What a convolution on the grid gives the tokens.

        Args:
            conv: depthwise, D channels.
            values: of the tokens [B, N', D].
            tokens: the tokens and how they came about.
            through: turns values of the residual stream, which dropped tokens are remembered by, into such values.
            places: their trace in one, for the images of `values`; None goes back map by map.
        """
        layer = lambda rows: from_map(conv(to_map(rows, tokens.layout.grid)))  # noqa: E731
        return on_grid(layer, values, tokens, self.tokenzoo_recipe, through, places)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma.flatten()


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution on rows [B, N, C]."""
    return pointwise(conv, x, PointwiseConv)
