"""A reducing model that answers with tokens: features, intermediates and logits from one loop over the blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.lift import lift
from ..core.recipe import Recipe
from ..core.signals import EmbedSignals
from ..core.tokens import Layout, Tokens
from .block import refuse_causal
from .features import Reads, decode, encode
from .halving import embed_half
from .intermediates import Intermediates
from .masks import four_dims, refuse_uneven, visible_tokens
from .pooling import pool_plain
from .refusals import refuse_symbols
from .swapping import hooked


class ReducingModel(Intermediates):
    """Mixin of models that answer with tokens: features, intermediates and logits from the one loop over the blocks.

    A family's subclass gives `embed` (image to tokens and a rotary table), `rope_of` (the table of one block) and
    `forward_head`; `head_reads` and `pool_tokens` where pooling is not plain. See docs/backbones.md.
    """

    norm: nn.Module
    num_prefix_tokens: int

    reads_positions: bool = False  # blocks look at the original places of tokens
    wants_all: bool = False  # the head wants all tokens in their places (a projector over the grid)

    gives_tokens = True
    takes_added = True
    takes_gates = True

    # ---- spelled by the family

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        """Image [B, C, H, W] -> token values before block 0 and the rotary table (None without)."""
        raise NotImplementedError

    @property
    def has_class(self) -> bool:
        """Whether the first token is a class token."""
        return self.cls_token is not None

    @property
    def final_norm(self) -> nn.Module:
        """What runs behind the last block, on every token."""
        return self.norm

    @property
    def pooling(self) -> str:
        """How tokens are pooled: "token", "avg", "avgmax", "max" or "" (not at all)."""
        return getattr(self, "global_pool", "token" if self.has_class else "avg")

    def head_reads(self) -> Reads:
        """What the head does with tokens, for the form that `forward_features` gives them."""
        return Reads.of(self.pooling)

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        """Pooling with side data at hand."""
        return pool_plain(tokens, kind, include_prefix=False, mass_weighted=self.tokenzoo_recipe.mass_weighted_pool)

    def tap(self, x: Tensor, index: int, norm: bool) -> Tensor:
        """Values [B, N, C] behind a block as `forward_intermediates` hands them out.

        Args:
            x: values of tokens.
            index: the block.
            norm: apply the final norm.
        """
        return self.final_norm(x) if norm else x

    def behind_blocks(self, tokens: Tokens) -> Tokens:
        """What the final norm reads: what the last block left, with tokens that join only there (a class token)."""
        return tokens

    def end_rows(self, rows: Tensor) -> Tensor:
        """Rows of the residual stream behind the last block as the head would get them: through the final norm."""
        return self.final_norm(rows)

    # ---- the sequence

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        size = recipe is not None and recipe.track_size
        positions = recipe is not None and (recipe.track_positions or self.reads_positions)
        keep = recipe is not None and recipe.keeps_trace
        added = 0 if recipe is None else recipe.protect
        prefix = self.num_prefix_tokens + added
        raster = recipe is not None and recipe.order == "raster"
        return {
            0: Layout(
                prefix, self.has_class, tuple(grid), size, positions, keep_values=keep, added=added, raster=raster
            )
        }

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        """Facts about the sequence of one pass, which a rotary table adds to."""
        layout = self.sequences(grid, self.tokenzoo_recipe)[0]
        return layout._replace(track_positions=layout.track_positions or rope is not None)

    @property
    def num_protected(self) -> int:
        """Prefix tokens, those included that the recipe says are added behind the model's own."""
        return self.num_prefix_tokens + self.tokenzoo_recipe.protect

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """The model's own `set_input_size`; blocks that are called without the model follow."""
        super().set_input_size(*args, **kwargs)
        layouts = self.sequences(self.own_grid, self.tokenzoo_recipe)
        for index, block in enumerate(self.served_blocks):
            layout = layouts[max(first for first in layouts if first <= index)]
            own = block.tokenzoo.layout._replace(grid=layout.grid, scan_rows=layout.scan_rows)
            block.tokenzoo = block.tokenzoo._replace(layout=own)

    def embed_half(self, images: Tensor) -> Tensor:
        """Embedding of the images at half resolution: a token for every 2 x 2 patches [B, C, H, W] -> [B, N / 4, D]."""
        return embed_half(self, images)

    # ---- the pass

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, Any]:
        values, rope = self.embed(x)
        return self.begin(x, values, rope, mask, trace, dense), rope

    def begin(
        self, images: Tensor, x: Tensor, rope: Any, mask: Tensor | None, trace: bool = False, dense: bool = False
    ) -> Tokens:
        """What enters block 0, from values that are embedded already.

        Args:
            images: [B, C, H, W].
            x: what `embed` gives for them [B, N, C].
            rope: the rotary table that goes with it.
            mask: see `start`.
            trace: see `start`.
            dense: see `start`.
        """
        recipe = self.tokenzoo_recipe
        dense = dense or self.pools_all or recipe.keeps_trace
        # whoever watches the blocks has to know what happened in front of them
        first = self.served_blocks[0]
        trace = trace or dense or (len(first.tokenzoo.at("embed")) > 0 and hooked(first))
        grid = self.grid_of(images.shape[-2:])
        if torch.jit.is_tracing():  # the tracer hands sizes out as tensors
            grid = tuple(int(side) for side in grid)
        layout = self.layout(tuple(grid), rope)._replace(keep_values=dense)
        layout.check_length(x.shape[1], type(self).__name__)
        visible = None
        if mask is not None:
            layout = layout._replace(track_positions=True)
            mask = four_dims(mask, x.shape[1])
            visible = visible_tokens(mask, x.shape[0], layout.num_prefix)
            steps = [step for block in self.served_blocks for step in block.tokenzoo.steps]
            refuse_uneven(mask, visible, layout.num_prefix, steps, self)
        coords = None
        if rope is not None and recipe.merged_positions == "mean":
            coords = _patch_coords(layout, x)
        tokens = Tokens(x, layout, coords=coords, trace=() if trace else None, visible=visible)
        for step in first.tokenzoo.at("embed"):
            signals = EmbedSignals(self, images, getattr(first, step.key) if step.key else None)
            token_map = step.decide(tokens, signals)
            if token_map is not None:
                tokens = tokens.reduce(token_map, step.block, step.method.name)
        return tokens

    def forward_tokens(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        trace: bool = False,
        is_causal: bool = False,
        dense: bool = False,
    ) -> Tokens:
        """All blocks and the final norm.

        Args:
            x: images [B, C, H, W].
            attn_mask: boolean or additive attention mask in original positions.
            trace: keep the maps, so that `tokens.trace` says where every patch went.
            is_causal: refused: reduction does not keep the order of tokens.
            dense: also keep the values that dropped tokens had, for `lift_features`.

        Returns:
            The remaining tokens with their side data; padding rows are zero.
        """
        refuse_symbols(self, x)
        refuse_causal(self, is_causal)
        for tokens in self.walk(x, attn_mask, trace=trace, dense=dense):  # noqa: B007 (only the last one is wanted)
            pass
        return self._finish(tokens)

    def _finish(self, tokens: Tokens) -> Tokens:
        tokens = self.behind_blocks(tokens)
        tokens = tokens._replace(x=self.final_norm(tokens.x))
        for step in self.served_blocks[-1].tokenzoo.at("norm"):
            token_map = step.decide(tokens, None)
            if token_map is not None:
                tokens = tokens.reduce(token_map, step.block, step.method.name)
        if tokens.valid is not None:
            tokens = tokens._replace(x=tokens.x * tokens.valid.unsqueeze(-1).to(tokens.x.dtype))
        return tokens

    def lift_features(self, tokens: Tokens) -> Tensor:
        """Tokens after the final norm, carried back to the full sequence.

        Args:
            tokens: what `forward_tokens(images, dense=True)` returned.

        Returns:
            [B, N, C] in the original order, prefix first. Merged patches read the token they went into; dropped ones
            come back as the recipe's `fill` says, through the final norm.
        """
        recipe = self.tokenzoo_recipe
        return lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill, self.end_rows)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens after the final norm as one tensor, of which `forward_head` makes what `forward` does.

        Args:
            x: images [B, C, H, W].
            attn_mask: see `forward_tokens`.
            is_causal: refused.

        Returns:
            The tokens that remain [B, N', C]; where pooling weighs them by size, and with dense=True in the recipe, all
            of them in their original places [B, N, C]. See `tokenzoo.adapters.features` for all forms.
        """
        weighs = self.head_reads().weighs(self.tokenzoo_recipe)
        dense = self.tokenzoo_recipe.dense
        return self.features(self.forward_tokens(x, attn_mask, trace=weighs, is_causal=is_causal, dense=dense))

    def features(self, tokens: Tokens) -> Tensor:
        """What `forward_features` returns, from tokens after the final norm with their trace."""
        recipe = self.tokenzoo_recipe
        return self.lift_features(tokens) if recipe.dense else encode(tokens, self.head_reads(), recipe)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Class scores of images [B, C, H, W]."""
        return self.forward_head(self.forward_tokens(x, attn_mask, is_causal=is_causal))

    @property
    def pools_all(self) -> bool:
        """Whether the head gets all tokens back before it pools them: `forward_features` gives no others."""
        return self.wants_all or (self.tokenzoo_recipe.dense and (not self.pooling or any(self.head_reads())))

    def read(self, x: Tensor | Tokens) -> Tokens:
        """Tokens as the head sees them; with dense=True in the recipe, all of them.

        Args:
            x: `Tokens` from `forward_tokens`, or what `forward_features` returned.
        """
        if not isinstance(x, Tensor):
            return Tokens(self.lift_features(x), x.layout) if self.pools_all and x.trace else x
        layout = self.head_layout(self.layout((1, x.shape[1] - self.num_protected)))
        return decode(x, self.head_reads(), self.tokenzoo_recipe, layout)

    def pool(self, x: Tensor | Tokens, pool_type: str | None = None) -> Tensor:
        """Pools tokens as the model does, with sizes and padding respected.

        Args:
            x: `Tokens` from `forward_tokens`, or what `forward_features` returned.
            pool_type: overrides the model's own pooling.

        Raises:
            ValueError: features that were given out for another pooling.
        """
        kind = self.pooling if pool_type is None else pool_type
        if isinstance(x, Tensor) and kind not in ("token", "", self.pooling) and not self.head_reads().attends:
            recipe = self.tokenzoo_recipe
            if recipe.mass_weighted_pool and not recipe.dense:
                raise ValueError(
                    f"{type(self).__name__}.pool: features for pooling {self.pooling!r} do not tell pooling "
                    f"{kind!r} the size of every token; call model.pool(model.forward_tokens(images), {kind!r})"
                )
        return self.pool_tokens(self.read(x), kind)


def _patch_coords(layout: Layout, x: Tensor) -> Tensor:
    """(row, column) of every token [B, N, 2] float32; prefix tokens get 0."""
    high, wide = layout.grid
    index = torch.arange(high * wide, device=x.device)
    coords = torch.stack([index.div(wide, rounding_mode="floor"), index % wide], dim=1).float()
    coords = torch.cat([coords.new_zeros(layout.num_prefix, 2), coords])
    return coords.expand(x.shape[0], -1, -1)
