"""SViT of tokenzoo.models: methods act in the stages whose blocks attend among all tokens.

Differences from upstream: the blocks of those stages are numbered 0, 1, ... through the stages in order. Each stage
begins a new sequence with its own grid: at its end every place of the grid gets a value back (dropped ones what the
recipe's `fill` says), and the model's own convolution halves the map. Only an importance that a method carries from
block to block goes along, summed over the places that become one. Behind the last stage, projection, norm and pooling
run on the tokens that are left; the place "norm" is in front of the projection, which that norm belongs to. Without
dense=True, `forward_features` gives the tokens that are left as a map one wide where some are missing, unless pooling
weighs places by size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.graphs import refuse_open_sizes
from ...core.lift import lift
from ...core.recipe import Recipe
from ...core.tokens import Tokens
from ...maps import RestoreMap
from ...models.svit.blocks import SuperTokenBlock
from ...models.svit.model import SViT
from ..backbone import Family
from ..features import Reads, decode, encode
from ..pooling import pool_plain
from ..refusals import Unscriptable, refuse_symbols, refuse_vmap
from .blocks import REDUCING_ATTENTIONS, ReducingSuperTokenBlock, begin, from_map, full_map, to_map
from .checks import bypassed, check, check_block, check_recipe, sequences
from .costs import read_svit_costs
from .token_norm import norm_alike, norm_tokens


class ReducingSViT(Unscriptable, SViT):
    """`SViT` whose stages with plain attention reduce tokens."""

    tokenzoo_recipe: Recipe

    # ---- the loop

    def _walk(self, x: Tensor, last: int | None = None) -> Iterator[tuple[int, Tokens]]:
        """Yields (stage, tokens): at the start of a stage with plain attention, after each of its blocks, and after
        any other stage as a whole.

        Args:
            x: images [B, C, H, W].
            last: index of the last stage to run, None for all.
        """
        refuse_symbols(self, x)
        refuse_open_sizes(self, x)
        refuse_vmap(self.tokenzoo_recipe)
        x, scores = self.patch_embed(x.contiguous(memory_format=torch.channels_last)), (None,)
        for index, stage in enumerate(self.layers):
            if not stage.is_plain:
                x, scores = stage.run_blocks(x), (None,)
            tokens = begin(x, self.tokenzoo_recipe, scores)
            yield index, tokens
            for block in stage.blocks if stage.is_plain else ():
                if stage.grad_checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, use_reentrant=False)
                else:
                    tokens = block(tokens)
                yield index, tokens
            if index == last or isinstance(stage.downsample, nn.Identity):
                return
            x = stage.downsample(full_map(tokens, self.tokenzoo_recipe))
            grid = int(x.shape[2]), int(x.shape[3])
            scores = tuple(_carried(held, tokens, grid) for held in (tokens.scores, *tokens.more_scores))

    def walk(self, x: Tensor, trace: bool = True, dense: bool = True) -> Iterator[Tokens]:
        """Yields the tokens at the start of each stage that methods act in, and after every block of it.

        Args:
            x: images [B, C, H, W].
            trace: the maps are kept in any case.
            dense: so are the values that dropped tokens had.
        """
        for index, tokens in self._walk(x):
            if self.layers[index].is_plain:
                yield tokens

    def forward_tokens(self, x: Tensor, trace: bool = True, dense: bool = True) -> Tokens:
        """All stages and the projection.

        Args:
            x: images [B, C, H, W].
            trace: the maps of the last stage are kept in any case.
            dense: so are the values that dropped tokens had.

        Returns:
            The remaining tokens of the last stage, projected, with their side data; padding rows are zero.
        """
        for _, tokens in self._walk(x):  # noqa: B007 (only the last one is wanted)
            pass
        return self._finish(tokens)

    def _finish(self, tokens: Tokens) -> Tokens:
        for step in self.blocks[-1].tokenzoo.at("norm") if self.blocks else ():
            token_map = step.decide(tokens, None)
            if token_map is not None:
                tokens = tokens.reduce(token_map, step.block, step.method.name)
        tokens = tokens._replace(x=self._projected(tokens))
        if tokens.valid is not None:
            tokens = tokens._replace(x=tokens.x * tokens.valid.unsqueeze(-1).to(tokens.x.dtype))
        return tokens

    def _projected(self, tokens: Tokens) -> Tensor:
        """Projection, norm and activation of tokens in front of them: [B, N, D]."""
        if not tokens.trace:
            return from_map(self._project(to_map(tokens.x, tokens.layout.grid)))
        return self.act(norm_tokens(self.norm, self._pointwise(tokens.x), tokens.valid))

    def _pointwise(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)

    # ---- outputs

    def lift_features(self, tokens: Tokens) -> Tensor:
        """Projected tokens, carried back to all places of the last stage.

        Args:
            tokens: what `forward_tokens(images)` returned.

        Returns:
            [B, N, D] in raster order. Merged places read the token they went into; dropped ones come back as the
            recipe's `fill` says, projected; in training they are normalised by the running statistics.
        """
        recipe = self.tokenzoo_recipe
        return lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill, self._project_rows)

    def _project_rows(self, rows: Tensor) -> Tensor:
        return self.act(norm_alike(self.norm, self._pointwise(rows)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Projected tokens of images [B, C, H, W] as a map, of which `forward_head` makes what `forward` does.

        Returns:
            [B, D, H / 32, W / 32] with dense=True in the recipe, where pooling weighs places by size, or where all
            places are there; else the N' tokens that are left as [B, D, N', 1].
        """
        return self.features(self.forward_tokens(x))

    def head_reads(self) -> Reads:
        """What the head does with places, for the form that `forward_features` gives them."""
        return Reads.of(self.global_pool.pool_type, include_prefix=True)

    def features(self, tokens: Tokens) -> Tensor:
        """What `forward_features` returns, from projected tokens."""
        grid = tokens.layout.grid
        if self.tokenzoo_recipe.dense or not tokens.trace:
            return to_map(self.lift_features(tokens), grid)
        rows = encode(tokens, self.head_reads(), self.tokenzoo_recipe)
        return to_map(rows, grid if rows.shape[1] == grid[0] * grid[1] else (rows.shape[1], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images [B, C, H, W]."""
        return self.forward_head(self.forward_tokens(x))

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifier.
        """
        kind, recipe = self.global_pool.pool_type, self.tokenzoo_recipe
        if isinstance(x, Tensor):
            tokens = decode(from_map(x), self.head_reads(), recipe, begin(x, recipe).layout)
            if tokens.size is None and tokens.valid is None:
                return super().forward_head(x, pre_logits)
            pooled = _pooled(tokens, kind, recipe.mass_weighted_pool) if kind else x
        elif not kind or recipe.dense or not x.trace:
            pooled = self.global_pool(self.features(x))
        else:
            pooled = _pooled(x, kind, recipe.mass_weighted_pool)
        pooled = self.head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """`SViT.forward_intermediates`; all maps are lifted to the full grid of their stage.

        Args:
            x: images [B, C, H, W].
            indices: stages; a number takes the last ones, None all.
            norm: refused: the only norm at the end belongs to the projection.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.

        Raises:
            ValueError: another format, or `norm`.
        """
        from timm.models._features import feature_take_indices

        if output_fmt != "NCHW" or norm:
            raise ValueError("SViT: intermediates are maps in NCHW without a norm; leave output_fmt and norm alone")
        wanted, last = feature_take_indices(len(self.layers), indices)
        ends = dict(self._walk(x, last if stop_early else None))  # the last tokens of every stage
        maps = [full_map(tokens, self.tokenzoo_recipe) for index, tokens in ends.items() if index in wanted]
        if intermediates_only:
            return maps
        index, tokens = max(ends.items())
        if index < len(self.layers) - 1:
            return self.layers[index].downsample(full_map(tokens, self.tokenzoo_recipe)), maps
        return self.features(self._finish(tokens)), maps


def _pooled(tokens: Tokens, kind: str, mass_weighted: bool) -> Tensor:
    """timm's pooling of maps [B, D] on tokens."""
    kind = kind.removeprefix("fast")
    if kind == "catavgmax":
        return torch.cat([pool_plain(tokens, part, True, mass_weighted) for part in ("avg", "max")], dim=1)
    return pool_plain(tokens, kind or "avg", True, mass_weighted)


def _carried(scores: Tensor | None, tokens: Tokens, grid: tuple[int, int]) -> Tensor | None:
    """An importance of tokens [B, N] that is carried along, for the next stage: summed over its places."""
    if scores is None:
        return None
    scores, old = scores.unsqueeze(-1), tokens.layout.grid
    if tokens.trace:  # the importance of a token is shared out among the places it stands for
        maps = tuple(step.map for step in tokens.trace)
        scores = RestoreMap(0, maps, (None,) * len(maps)).pool(scores)
    means = F.adaptive_avg_pool2d(to_map(scores, old), grid)
    return from_map(means).squeeze(-1) * (old[0] * old[1] / (grid[0] * grid[1]))


FAMILY = Family(
    name="svit",
    summary="tokenzoo.models: SViT, in the stages with plain attention",
    models={SViT: ReducingSViT},
    blocks={SuperTokenBlock: ReducingSuperTokenBlock},
    attentions=REDUCING_ATTENTIONS,
    check=check,
    check_block=check_block,
    check_recipe=check_recipe,
    sequences=sequences,
    costs=read_svit_costs,
    bypassed=bypassed,
)
