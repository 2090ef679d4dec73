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

import torch
from torch import Tensor, nn

from ...core.lift import lift
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...models.svit.blocks import SuperTokenBlock
from ...models.svit.model import SViT
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..features import Reads, decode, encode
from ..flow import Flow
from ..model import ReducingModel
from ..staged import carried
from ..walk import Beside
from .blocks import REDUCING_ATTENTIONS, ReducingSuperTokenBlock, begin, from_map, full_map, to_map
from .checks import bypassed, check, check_block, check_recipe
from .costs import leaving_rows, stage_rows, stem_macs
from .layouts import stage_layouts
from .stages import Taps, pooled_by
from .token_norm import norm_alike, norm_tokens


class ReducingSViT(ReducingModel, SViT):
    """`SViT` whose stages with plain attention reduce tokens."""

    has_class = False
    takes_added = False
    takes_gates = False
    num_prefix_tokens = 0

    @property
    def pooling(self) -> str:
        return self.global_pool.pool_type

    # ---- the sequences

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        return stage_layouts(self, grid, recipe)

    def checkpoints(self, index: int) -> bool:
        return self.layers[self._stage_of(index)].grad_checkpointing

    def _stage_of(self, block: int) -> int:
        """The stage that a block stands in."""
        return next(i for i, stage in enumerate(self.layers) if self.blocks[block] in tuple(stage.blocks))

    def _ends(self, stage: int, taps: Taps | None) -> bool:
        """Whether a pass goes no further than the blocks of a stage."""
        return isinstance(self.layers[stage].downsample, nn.Identity) or (taps is not None and stage == taps.last)

    # ---- what the ends cost

    def embed_macs(self, grid: tuple[int, int]) -> int:
        total = stem_macs(self.patch_embed) * grid[0] * grid[1]
        for index in range(self._stage_of(0)):
            total += sum(row.macs for row in stage_rows(self, index, grid))
        return total

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        stage, rows = self._stage_of(index), []
        if index + 1 == len(self.blocks):
            stop = len(self.layers)
        elif (stop := self._stage_of(index + 1)) == stage:
            return []
        rows += leaving_rows(self, stage, flow)
        for later in range(stage + 1, stop):
            rows += stage_rows(self, later, flow.grid)
        return rows

    def head_macs(self, n: int, layout: Layout) -> int:
        return conv_macs(self.proj) * n + linear_macs(self.head) * (1 if self.pooling else n)

    # ---- the pass

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, None]:
        return self._start(x), None

    def _start(self, x: Tensor, taps: Taps | None = None) -> Tokens:
        return self._enter(self.patch_embed(x.contiguous(memory_format=torch.channels_last)), 0, (None,), taps)

    def _enter(self, x: Tensor, stage: int, scores: tuple[Tensor | None, ...], taps: Taps | None) -> Tokens:
        """Tokens of the first stage that methods act in, or of the last one; stages in front of it run as they are.

        Args:
            x: the map in front of a stage.
            stage: the stage.
            scores: importance that each method which carries one has of the places.
            taps: of this pass.
        """
        while not self.layers[stage].is_plain:
            x, scores = self.layers[stage].run_blocks(x), (None,)
            if taps is not None:
                taps.maps[stage] = x
            if self._ends(stage, taps):
                break
            x, stage = self.layers[stage].downsample(x), stage + 1
        return begin(x, self.tokenzoo_recipe, scores)

    def _leave(self, tokens: Tokens, stage: int, taps: Taps | None) -> Tokens:
        """Tokens of the next sequence behind a stage with plain attention."""
        full = full_map(tokens, self.tokenzoo_recipe)
        if taps is not None:
            taps.maps[stage] = full
        x = self.layers[stage].downsample(full)
        grid = int(x.shape[2]), int(x.shape[3])
        scores = tuple(carried(held, tokens, grid) for held in (tokens.scores, *tokens.more_scores))
        return self._enter(x, stage + 1, scores, taps)

    def restart(self, tokens: Tokens, index: int, context: Taps | None) -> Tokens:
        stage = self._stage_of(index - 1)
        return tokens if stage == self._stage_of(index) else self._leave(tokens, stage, context)

    def rope_of(self, rope: Taps | None, index: int) -> None:
        return None  # blocks have nothing to do with it

    def _finish(self, tokens: Tokens) -> Tokens:
        if not self.blocks:  # pruned to stages that methods do not act in
            return self._project_tokens(tokens)
        stage = self._stage_of(len(self.blocks) - 1)
        # stages behind the last block that methods act in run as they are
        return self._project_tokens(tokens if self._ends(stage, None) else self._leave(tokens, stage, None))

    def _project_tokens(self, tokens: Tokens) -> Tokens:
        """Tokens at the end of the last stage, projected; padding rows are zero."""
        for step in self.blocks[-1].tokenzoo.at("norm") if self.blocks else ():
            token_map = step.decide(tokens, None)
            if token_map is not None:
                tokens = tokens.reduce(token_map, step.block, step.method.name)
        tokens = tokens._replace(x=self._projected(tokens))
        if tokens.valid is not None:
            tokens = tokens._replace(x=tokens.x * tokens.valid.unsqueeze(-1).to(tokens.x.dtype))
        return tokens

    def forward_tokens(self, x: Tensor, trace: bool = True, dense: bool = True) -> Tokens:
        """All stages and the projection.

        Args:
            x: images [B, C, H, W].
            trace: the maps of the last stage are kept in any case.
            dense: so are the values that dropped tokens had.

        Returns:
            The remaining tokens of the last stage, projected, with their side data; padding rows are zero.
        """
        return super().forward_tokens(x)

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
            pooled = pooled_by(tokens, kind, recipe.mass_weighted_pool) if kind else x
        elif not kind or recipe.dense or not x.trace:
            pooled = self.global_pool(self.features(x))
        else:
            pooled = pooled_by(x, kind, recipe.mass_weighted_pool)
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
        taps = Taps({}, last if stop_early else len(self.layers) - 1)
        run = sum(len(stage.blocks) for stage in self.layers[: taps.last + 1] if stage.is_plain)
        for tokens in self.follow(self._start(x, taps), taps, last=run - 1):  # noqa: B007 (only the last one is wanted)
            pass
        if run > 0:
            stage = self._stage_of(run - 1)
            if self._ends(stage, taps):
                taps.maps[stage] = full_map(tokens, self.tokenzoo_recipe)
            else:
                tokens = self._leave(tokens, stage, taps)
        maps = [taps.maps[index] for index in wanted]
        if intermediates_only:
            return maps
        if taps.last < len(self.layers) - 1:
            return self.layers[taps.last].downsample(taps.maps[taps.last]), maps
        return self.features(self._project_tokens(tokens)), maps


FAMILY = Family(
    name="svit",
    summary="tokenzoo.models: SViT, in the stages with plain attention",
    models={SViT: ReducingSViT},
    blocks={SuperTokenBlock: ReducingSuperTokenBlock},
    attentions=REDUCING_ATTENTIONS,
    check=check,
    check_block=check_block,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
