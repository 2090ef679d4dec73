"""XCiT's block on tokens: attention among channels, then a look at the neighbours on the grid, then the MLP.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the projection can be split, and sizes and padding count in
the sums over tokens that say which channel reads which (`ops/channels.py`). The local patch interaction stays on the
full grid: every place gets the value of the token it belongs to, dropped ones what the recipe's `fill` says, and what
the convolutions give goes back to the tokens through the same maps (`on_grid`); methods between attention and MLP act
behind it. Until something is reduced it runs as upstream.
"""

from __future__ import annotations

from typing import Any

from timm.models.xcit import XCA, XCABlock
from torch import Tensor, nn

from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...core.signals import Signals
from ...core.tokens import Tokens
from ...ops.attention import Heads
from ...ops.layer_macs import conv_macs, linear_macs, linear_shapes, stream_width
from ...ops.projections import linear_part
from ..attending import AttentionLayer
from ..block import BlockMacs, BlockPlan, ReducingBlock
from ..flow import Flow
from ..grid_costs import to_grid_and_back
from ..hooked import Aside
from ..merging import Merging
from ..on_grid import on_grid
from ..places import places_of
from ..vit.attention import split_heads


def attention_width(attn: nn.Module) -> int:
    """Channels of all heads together."""
    return next(inputs for _, inputs, _ in linear_shapes(attn.proj))


def drop_path(block: nn.Module, branch: int) -> nn.Module:
    """The stochastic depth of a branch; older releases of timm have one module for all branches."""
    return getattr(block, f"drop_path{branch}", None) or block.drop_path


class ReducingXCA(AttentionLayer, XCA):
    """`XCA` inside a block that reduces tokens."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = attention_width(self)
        parts = linear_part(self.qkv, z, 0, width * (3 if with_values else 2)).split(width, dim=2)
        q, k, *v = (split_heads(part, width // self.num_heads) for part in parts)
        return Heads(
            q, k, v[0] if v else None, 1.0, fused=self.fused_attn, drop=self.attn_drop, temperature=self.temperature
        )

    def project_values(self, z: Tensor) -> Tensor:
        width = attention_width(self)
        return split_heads(linear_part(self.qkv, z, 2 * width, 3 * width), width // self.num_heads)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


class ReducingXCABlock(ReducingBlock, XCABlock):
    """`XCABlock` on tokens."""

    tokenzoo: BlockPlan
    tokenzoo_recipe: Recipe
    reads_recipe = True  # what dropped tokens get on the grid
    attends_among = "channels"

    def forward(
        self,
        x: Any,
        H: int | None = None,
        W: int | None = None,
        rope: None = None,
        attn_mask: Tensor | None = None,
        aside: Aside | None = None,
    ) -> Any:
        """Tokens to tokens; H and W are timm's: for blocks called by hand, the grid of the model's own image."""
        if isinstance(x, Tensor) and aside is None and H is not None:
            grid = self.tokenzoo.layout.grid
            if (int(H), int(W)) != tuple(grid):
                raise ValueError(
                    f"block {self.tokenzoo.index} was called with a grid of {H} x {W}, but the model's own image has "
                    f"{grid[0]} x {grid[1]} patches; call the model for images of another size"
                )
        return self.call(x, rope, attn_mask, False, aside)

    # ---- the parts

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return drop_path(self, 1)(self.gamma1 * outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return drop_path(self, 2)(self.gamma2 * self.mlp(z))

    def _attend(self, tokens: Tokens, rope: Any, mask: Tensor | None) -> tuple[Tokens, Signals, Merging]:
        tokens, signals, merging = super()._attend(tokens, rope, mask)
        y = drop_path(self, 3)(self.gamma3 * self._neighbours(tokens))
        return tokens._replace(x=tokens.x + y), signals, merging

    def _neighbours(self, tokens: Tokens) -> Tensor:
        """The local patch interaction."""
        z, (high, wide) = self.norm3(tokens.x), tokens.layout.grid
        if not tokens.trace:
            return self.local_mp(z, high, wide)
        recipe, layer = self.tokenzoo_recipe, lambda rows: self.local_mp(rows, high, wide)  # noqa: E731
        return on_grid(layer, z, tokens, recipe, self.norm3, places_of(tokens.trace, recipe.fill, z.dtype))

    # ---- what they cost

    def shape(self) -> BlockShape:
        attn, width = self.attn, attention_width(self.attn)
        return BlockShape(stream_width(attn, {"qkv": 3 * width}, width), attn.num_heads, width // attn.num_heads)

    def macs(self) -> BlockMacs:
        shape = self.shape()
        width, dim = shape.num_heads * shape.head_dim, shape.dim
        among = width * shape.head_dim  # products among the channels of a head, for every token
        return BlockMacs(2 * width * dim + among, width * dim + among, 0, width * dim, linear_macs(self.mlp))

    def cost(self, flow: Flow) -> int:
        return super().cost(flow) + conv_macs(self.local_mp) * flow.layout.num_patches

    def overhead(self, flow: Flow) -> int:
        dim = self.shape().dim
        return super().overhead(flow) + to_grid_and_back(flow.held_attended, dim, dim, flow)
