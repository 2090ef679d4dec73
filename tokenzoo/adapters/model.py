"""A reducing model: one loop over the blocks for features, intermediates and logits alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..recipes import Recipe
from ..tokens import Layout, Tokens, lift
from .block import four_dims, refuse_causal


class BackboneInfo(NamedTuple):
    """What patching needs to know about a model.

    Attributes:
        depth: number of blocks.
        dim: channels of the residual stream.
        layout: token layout at the model's own image size.
    """

    depth: int
    dim: int
    layout: Layout


class ReducingModel:
    """Mixin that owns the loop over the blocks, for features, intermediates and logits alike.

    A family's subclass gives `embed` (image to tokens and a rotary table) and `rope_of` (the table of one block).
    """

    tokenzoo_recipe: Recipe
    blocks: nn.Module
    norm: nn.Module
    grad_checkpointing: bool
    num_prefix_tokens: int

    # ---- spelled by the family

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        """Image [B, C, H, W] -> token values before block 0 and the rotary table (None without)."""
        raise NotImplementedError

    def rope_of(self, rope: Any, index: int) -> Any:
        """The rotary table of one block."""
        return rope

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        """Facts about the sequence at a patch grid."""
        recipe = self.tokenzoo_recipe
        return Layout(
            self.num_prefix_tokens,
            self.cls_token is not None,
            grid,
            recipe.track_size,
            recipe.track_positions or rope is not None,
        )

    # ---- the loop

    def walk(
        self, x: Tensor, mask: Tensor | None, last: int | None = None, trace: bool = False, dense: bool = False
    ) -> Iterator[Tokens]:
        """Yields the tokens before block 0 and after every block up to `last`.

        Args:
            x: images [B, C, H, W].
            mask: attention mask in original positions, or None.
            last: index of the last block to run, None for all.
            trace: keep the maps.
            dense: also keep the values before each map.
        """
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x, rope = self.embed(x)
        layout = self.layout(tuple(grid), rope)
        if mask is not None:
            layout = layout._replace(track_positions=True)
            mask = four_dims(mask, x.shape[1])
        coords = None
        if rope is not None and self.tokenzoo_recipe.merged_positions == "mean":
            coords = _patch_coords(layout, x)
        tokens = Tokens(x, layout, coords=coords, trace=() if trace or dense else None)
        yield tokens
        blocks = self.blocks if last is None else self.blocks[: last + 1]
        for index, block in enumerate(blocks):
            table = self.rope_of(rope, index)
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                tokens = checkpoint(_call, block, tokens, table, mask, use_reentrant=False)
            else:
                tokens = _call(block, tokens, table, mask)
            yield tokens

    def forward_tokens(
        self, x: Tensor, attn_mask: Tensor | None = None, trace: bool = False, is_causal: bool = False
    ) -> Tokens:
        """All blocks and the final norm.

        Args:
            x: images [B, C, H, W].
            attn_mask: boolean or additive attention mask in original positions.
            trace: keep the maps, so that `tokens.trace` says where every patch went.
            is_causal: refused: reduction does not keep the order of tokens.

        Returns:
            The remaining tokens with their side data; padding rows are zero.
        """
        refuse_causal(self, is_causal)
        for tokens in self.walk(x, attn_mask, trace=trace):  # noqa: B007 (only the last one is wanted)
            pass
        return self._finish(tokens)

    def _finish(self, tokens: Tokens) -> Tokens:
        x = self.norm(tokens.x)
        if tokens.valid is not None:
            x = x * tokens.valid.unsqueeze(-1).to(x.dtype)
        return tokens._replace(x=x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Remaining tokens after the final norm [B, N', C]; N' is smaller than in the unpatched model."""
        return self.forward_tokens(x, attn_mask, is_causal=is_causal).x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Class scores of images [B, C, H, W]."""
        return self.forward_head(self.forward_tokens(x, attn_mask, is_causal=is_causal))

    def pool(self, x: Tensor | Tokens, pool_type: str | None = None) -> Tensor:
        """Pools tokens as the model does, with sizes and padding respected.

        Args:
            x: `Tokens` from `forward_tokens`, or features [B, N, C] where pooling needs neither sizes nor padding.
            pool_type: overrides the model's own pooling.

        Raises:
            ValueError: features without side data where pooling needs it.
        """
        kind = self.global_pool if pool_type is None else pool_type
        if isinstance(x, Tokens):
            return self.pool_tokens(x, kind)
        recipe = self.tokenzoo_recipe
        uneven = recipe.mass_weighted_pool or any(m.pads for m in recipe.methods)
        if kind not in ("token", "") and (uneven or (self.attn_pool is not None and recipe.proportional)):
            raise ValueError(
                f"{type(self).__name__}.forward_head: pooling {kind!r} needs the size or validity of every token, "
                "which a plain tensor lacks; call model(images), or model.forward_head(model.forward_tokens(images))"
            )
        return super().pool(x, pool_type)

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        """Pooling with side data at hand."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`; NCHW maps are lifted to the full grid, NLC lists hold the reduced tokens.

        Args:
            x: images [B, C, H, W].
            indices: last n blocks if int, all if None, else the blocks named.
            return_prefix_tokens: also return the prefix tokens of each intermediate.
            norm: apply the final norm to the intermediates.
            stop_early: stop after the last block named.
            output_fmt: "NCHW" (every patch reads the token it went into, dropped ones keep their last value) or "NLC".
            intermediates_only: leave the final features out.
            output_dict: return a dict as timm does.
            attn_mask: see `forward_tokens`.
            is_causal: refused.
        """
        from timm.models._features import feature_take_indices

        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; use 'NCHW' or 'NLC'")
        refuse_causal(self, is_causal)
        take, max_index = feature_take_indices(len(self.blocks), indices)
        dense, prefix = output_fmt == "NCHW", self.num_prefix_tokens
        spatial: list[Tensor] = []
        prefixes: list[Tensor] = []
        last = max_index if stop_early else None
        for index, tokens in enumerate(self.walk(x, attn_mask, last, dense=dense), -1):
            if index not in take:
                continue
            y = lift(tokens.x, tokens.trace) if dense else tokens.x
            y = self.norm(y) if norm else y
            if not dense and tokens.valid is not None:
                y = y * tokens.valid.unsqueeze(-1).to(y.dtype)
            prefixes.append(y[:, :prefix])
            y = y[:, prefix:]
            if dense:
                y = y.transpose(1, 2).unflatten(2, tokens.layout.grid).contiguous()
            spatial.append(y)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": spatial}
            if prefix and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self._finish(tokens).x
            return result
        out = list(zip(spatial, prefixes)) if return_prefix_tokens and prefix else spatial
        return out if intermediates_only else (self._finish(tokens).x, out)


def _call(block: nn.Module, tokens: Tokens, rope: Any, mask: Tensor | None) -> Tokens:
    return block(tokens, rope=rope, attn_mask=mask)


def _patch_coords(layout: Layout, x: Tensor) -> Tensor:
    """(row, column) of every token [B, N, 2] float32; prefix tokens get 0."""
    high, wide = layout.grid
    index = torch.arange(high * wide, device=x.device)
    coords = torch.stack([index.div(wide, rounding_mode="floor"), index % wide], dim=1).float()
    coords = torch.cat([coords.new_zeros(layout.num_prefix, 2), coords])
    return coords.expand(x.shape[0], -1, -1)
