"""What timm calls intermediates: features behind some blocks, of one loop over the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from ..core.lift import lift
from ..core.tokens import Tokens
from ..ops.rows import split_dim
from .block import refuse_causal
from .refusals import refuse_symbols
from .walk import Walk


class Intermediates(Walk):
    """Mixin of models that give out features behind their blocks; part of `ReducingModel`, which has what it calls."""

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
            output_fmt: "NCHW" (every patch reads the token it went into, dropped ones come back as the recipe's `fill`
                says) or "NLC".
            intermediates_only: leave the final features out.
            output_dict: return a dict as timm does.
            attn_mask: see `forward_tokens`.
            is_causal: refused.
        """
        from timm.models._features import feature_take_indices

        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; use 'NCHW' or 'NLC'")
        refuse_symbols(self, x)
        refuse_causal(self, is_causal)
        take, max_index = feature_take_indices(len(self.served_blocks), indices)
        dense = output_fmt == "NCHW"
        spatial: list[Tensor] = []
        prefixes: list[Tensor] = []
        last = max_index if stop_early else None
        weighs = self.head_reads().weighs(self.tokenzoo_recipe)
        keep = dense or self.tokenzoo_recipe.dense
        for index, tokens in self._left(self.walk(x, attn_mask, last, trace=weighs, dense=keep)):
            if index not in take:
                continue
            tap = partial(self.tap, index=index, norm=norm)
            y = tap(tokens.x)
            if dense:
                recipe = self.tokenzoo_recipe
                y = lift(y, recipe.lift_trace(tokens.trace), recipe.fill, tap)
            if not dense and tokens.valid is not None:
                y = y * tokens.valid.unsqueeze(-1).to(y.dtype)
            prefix = tokens.layout.num_prefix
            prefixes.append(y[:, :prefix])
            y = y[:, prefix:]
            if dense:
                y = split_dim(y.transpose(1, 2), 2, *tokens.layout.grid).contiguous()
            spatial.append(y)
        return_prefix_tokens = return_prefix_tokens and any(rows.shape[1] for rows in prefixes)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": spatial}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.features(self._finish(tokens))
            return result
        out = list(zip(spatial, prefixes)) if return_prefix_tokens else spatial
        return out if intermediates_only else (self.features(self._finish(tokens)), out)

    def _left(self, walked: Iterator[Tokens]) -> Iterator[tuple[int, Tokens]]:
        """(block, what it left) of a walk, -1 for what entered block 0; without what enters later sequences."""
        entering = set(self.sequences((1, 1), self.tokenzoo_recipe)) - {0}
        index = -2
        for tokens in walked:
            if index + 1 in entering:
                entering.discard(index + 1)
                continue
            index += 1
            yield index, tokens
