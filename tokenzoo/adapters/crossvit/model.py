"""timm's crossvit.py: CrossViT, each branch by itself; class tokens are exchanged as published, see `exchange`.

Read from timm 1.0.19 to 1.0.31. The blocks of a method are those of the small-patch branch through all multi-scale
blocks, and behind them those of the large-patch branch: each branch is one sequence, which goes on with the tokens that
are left from one multi-scale block to the next. Differences from upstream: the model's subclass owns the loop,
pooling knows sizes and padding, and intermediates in NCHW are lifted to the full grid of their branch (older releases
of timm have none; a patched model does). `forward_tokens` gives a list, the tokens of each branch; reports end with
those of the last one. Images of any size are scaled to the two that the model embeds, as upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.models.crossvit import CrossVit, scale_image
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...core.lift import lift
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import linear_macs
from ..backbone import Family
from ..features import Reads, decode, encode
from ..flow import Flow
from ..heads import embed_macs
from ..on_grid import to_map
from ..pooling import pool_plain
from ..refusals import refuse_symbols
from ..staged import refuse_across_stages
from ..vit.attention import REDUCING_ATTENTIONS
from ..vit.model import ReducingVitBlock
from ..walk import Beside, Walk
from .exchange import exchange_macs, exchanged, fusion_names, refuse_other_parts


class ReducingCrossVit(Walk, CrossVit):
    """`CrossVit` whose branches reduce tokens."""

    num_prefix_tokens = 1

    # ---- the sequences

    @property
    def scales(self) -> tuple[nn.Module, ...]:
        """The multi-scale blocks; each runs both branches and exchanges their class tokens."""
        return tuple(self.blocks)

    def blocks_of_branches(self) -> list[tuple[nn.Module, ...]]:
        """The blocks of every branch through all multi-scale blocks."""
        found: list[list[nn.Module]] = [[] for _ in range(self.num_branches)]
        for scale in self.scales:
            for blocks, own in zip(found, scale.blocks or ()):
                blocks.extend(own)
        return [tuple(blocks) for blocks in found]

    @property
    def served_blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of all branches, one branch behind the other."""
        return tuple(block for blocks in self.blocks_of_branches() for block in blocks)

    def firsts(self) -> list[int]:
        """The first block of every branch."""
        counts = [len(blocks) for blocks in self.blocks_of_branches()]
        return [sum(counts[:branch]) for branch in range(len(counts))]

    def grids(self) -> list[tuple[int, int]]:
        """Patches (high, wide) of every branch."""
        sizes = zip(self.patch_embed, self.img_size_scaled)
        return [tuple(side // step for side, step in zip(size, embed.patch_size)) for embed, size in sizes]

    @property
    def own_grid(self) -> tuple[int, int]:
        return self.grids()[0]

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.own_grid  # images are scaled

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        size = recipe is not None and recipe.track_size
        positions = recipe is not None and recipe.track_positions
        keep = recipe is not None and recipe.keeps_trace
        raster = recipe is not None and recipe.order == "raster"
        return {
            first: Layout(1, True, grid, size, positions, keep_values=keep, raster=raster)
            for first, grid in zip(self.firsts(), self.grids())
        }

    # ---- the pass

    def embed(self, x: Tensor) -> list[Tensor]:
        """What enters the first block of every branch [B, 1 + N, C]."""
        found = []
        for branch, embed in enumerate(self.patch_embed):
            rows = embed(scale_image(x, self.img_size_scaled[branch], self.crop_scale))
            own = getattr(self, f"cls_token_{branch}").expand(x.shape[0], -1, -1)
            found.append(self.pos_drop(torch.cat([own, rows], dim=1) + getattr(self, f"pos_embed_{branch}")))
        return found

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, list[Tokens]]:
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} takes no attn_mask: its branches have grids of their own, and no mask fits "
                "both; call the model without one"
            )
        dense = dense or self._pools_all or self.tokenzoo_recipe.keeps_trace
        branches = []
        for values, layout in zip(self.embed(x), self.sequences(self.own_grid, self.tokenzoo_recipe).values()):
            layout = layout._replace(keep_values=dense)
            layout.check_length(values.shape[1], type(self).__name__)
            branches.append(Tokens(values, layout, trace=() if trace or dense else None))
        return branches[0], branches

    def follow(
        self, tokens: Tokens, context: list[Tokens], mask: Tensor | None = None, last: int | None = None
    ) -> Iterator[Tokens]:
        seen = [[entered] for entered in context]
        for _ in self._scales_run(context, seen):
            pass
        yield from (tokens for branch in seen for tokens in branch)

    def _scales_run(
        self, branches: list[Tokens], seen: list[list[Tokens]] | None = None
    ) -> Iterator[tuple[int, list[Tokens]]]:
        """(index, tokens of all branches) behind every multi-scale block.

        Args:
            branches: what enters.
            seen: gets what every block leaves, by branch; the last one of a multi-scale block behind the exchange.
        """
        for index, scale in enumerate(self.scales):
            left = []
            for branch, tokens in enumerate(branches):
                for block in scale.blocks[branch]:
                    tokens = block(tokens)
                    if seen is not None:
                        seen[branch].append(tokens)
                left.append(tokens)
            branches = exchanged(scale, left, self.tokenzoo_recipe)
            for branch, tokens in enumerate(branches if seen is not None else ()):
                seen[branch][-1] = tokens
            yield index, branches

    def forward_tokens(self, x: Tensor, trace: bool = False, dense: bool = False) -> list[Tokens]:
        """All blocks and the final norms.

        Args:
            x: images [B, C, H, W].
            trace: keep the maps.
            dense: also keep the values that dropped tokens had.

        Returns:
            The remaining tokens of every branch with their side data; padding rows are zero.
        """
        refuse_symbols(self, x)
        _, branches = self.start(x, None, trace, dense)
        for _, branches in self._scales_run(branches):  # noqa: B007, B020 (only the last ones are wanted)
            pass
        return self._finish(branches)

    def _finish(self, branches: list[Tokens]) -> list[Tokens]:
        found = []
        for branch, tokens in enumerate(branches):
            tokens = tokens._replace(x=self.norm[branch](tokens.x))
            for step in self.served_blocks[-1].tokenzoo.at("norm") if branch == len(branches) - 1 else ():
                token_map = step.decide(tokens, None)
                if token_map is not None:
                    tokens = tokens.reduce(token_map, step.block, step.method.name)
            if tokens.valid is not None:
                tokens = tokens._replace(x=tokens.x * tokens.valid.unsqueeze(-1).to(tokens.x.dtype))
            found.append(tokens)
        return found

    # ---- outputs

    @property
    def _pools_all(self) -> bool:
        """Whether the heads get all tokens back before they pool them."""
        return self.tokenzoo_recipe.dense and any(self.head_reads())

    def head_reads(self) -> Reads:
        """What the heads do with tokens, for the form that `forward_features` gives them."""
        return Reads.of(self.global_pool)

    def _lifted(self, tokens: Tokens, branch: int) -> Tensor:
        """Normed tokens of a branch at all of its places [B, 1 + N, C]."""
        recipe = self.tokenzoo_recipe
        return lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill, self.norm[branch])

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Tokens after the final norms as tensors, of which `forward_head` makes what `forward` does.

        Args:
            x: images [B, C, H, W].

        Returns:
            For each branch, the tokens that remain [B, N', C]; where pooling weighs them by size, and with dense=True
            in the recipe, all of them in their original places [B, 1 + N, C].
        """
        recipe, reads = self.tokenzoo_recipe, self.head_reads()
        return self._features(self.forward_tokens(x, trace=reads.weighs(recipe), dense=recipe.dense))

    def _features(self, branches: list[Tokens]) -> list[Tensor]:
        recipe, reads = self.tokenzoo_recipe, self.head_reads()
        if recipe.dense:
            return [self._lifted(tokens, branch) for branch, tokens in enumerate(branches)]
        return [encode(tokens, reads, recipe) for tokens in branches]

    def forward_head(self, xs: list[Tensor] | list[Tokens], pre_logits: bool = False) -> Tensor:
        """Pooling, and the mean of both classifiers.

        Args:
            xs: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifiers.
        """
        pooled = [self.head_drop(self._pooled(x, branch)) for branch, x in enumerate(xs)]
        if pre_logits or isinstance(self.head[0], nn.Identity):
            return torch.cat(pooled, dim=1)
        return torch.stack([head(row) for head, row in zip(self.head, pooled)]).mean(0)

    def _pooled(self, x: Tensor | Tokens, branch: int) -> Tensor:
        recipe = self.tokenzoo_recipe
        layout = list(self.sequences(self.own_grid, recipe).values())[branch]
        if not isinstance(x, Tokens):
            tokens = decode(x, self.head_reads(), recipe, layout)
        else:
            tokens = Tokens(self._lifted(x, branch), layout) if self._pools_all and x.trace else x
        return pool_plain(tokens, self.global_pool, include_prefix=False, mass_weighted=recipe.mass_weighted_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images [B, C, H, W]."""
        return self.forward_head(self.forward_tokens(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`: patches of a branch behind a multi-scale block, all small-patch ones first.

        Args:
            x: images [B, C, H, W].
            indices: last n if int, all if None, else those named; branch times the number of multi-scale blocks, plus
                the block.
            norm: apply the final norm of the branch.
            stop_early: stop behind the last multi-scale block that is needed.
            output_fmt: "NCHW" (every patch reads the token it went into, dropped ones come back as the recipe's `fill`
                says) or "NLC", the tokens that are left.
            intermediates_only: leave the final features out.

        Raises:
            ValueError: another format.
        """
        from timm.models._features import feature_take_indices

        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; use 'NCHW' or 'NLC'")
        refuse_symbols(self, x)
        recipe, count = self.tokenzoo_recipe, len(self.scales)
        take, _ = feature_take_indices(self.num_branches * count, indices)
        last = max(index % count for index in take) if stop_early else count - 1
        dense = output_fmt == "NCHW" or recipe.dense
        _, branches = self.start(x, None, self.head_reads().weighs(recipe), dense)
        found: dict[int, Tensor] = {}
        for scale, branches in self._scales_run(branches):  # noqa: B020
            for branch, tokens in enumerate(branches):
                if branch * count + scale in take:
                    found[branch * count + scale] = self._tapped(tokens, branch, norm, output_fmt)
            if scale == last:
                break
        maps = [found[index] for index in sorted(found)]
        return maps if intermediates_only else (self._features(self._finish(branches)), maps)

    def _tapped(self, tokens: Tokens, branch: int, norm: bool, output_fmt: str) -> Tensor:
        recipe, through = self.tokenzoo_recipe, self.norm[branch] if norm else nn.Identity()
        y = through(tokens.x)
        if output_fmt == "NCHW":
            y = lift(y, recipe.lift_trace(tokens.trace), recipe.fill, through)
            return to_map(y[:, 1:], tokens.layout.grid).contiguous()
        return (y if tokens.valid is None else y * tokens.valid.unsqueeze(-1).to(y.dtype))[:, 1:]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        raise ValueError(
            f"{type(self).__name__} is patched, and blocks of both branches would go, so that those of the second one "
            "get other numbers; unpatch it, prune it, and patch it again"
        )

    # ---- what it costs, for one image

    def embed_macs(self, grid: tuple[int, int]) -> int:
        return sum(embed_macs(embed, own) for embed, own in zip(self.patch_embed, self.grids()))

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        rows, end = [], -1
        branch = max(i for i, first in enumerate(self.firsts()) if first <= index)
        asking = (branch + self.num_branches - 1) % self.num_branches  # who reads this branch
        for order, scale in enumerate(self.scales):
            end += len(scale.blocks[branch])
            if self.firsts()[branch] + end == index:
                name = f"blocks.{order}.fusion.{asking}"
                rows.append(Beside(name, flow.left, flow.left, exchange_macs(scale, asking, flow.left)))
        return rows

    def head_macs(self, n: int, layout: Layout) -> int:
        return sum(linear_macs(head) for head in self.head)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: other than two branches; a multi-scale block that lacks blocks of a branch; parts of the exchange of
            other classes than timm's own.
    """
    name = type(model).__name__
    if model.num_branches != 2:
        raise ValueError(f"{name} has {model.num_branches} branches; timm embeds images for two of them")
    refuse_other_parts(model)
    for order, scale in enumerate(model.blocks):
        if scale.blocks is None or len(scale.blocks) != 2:
            raise ValueError(
                f"{name}.blocks.{order} lacks blocks of a branch, and timm runs those of the other in their place; "
                "create it with one block or more of each branch in depth"
            )


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: images of half the size; tokens rebuilt in another branch than they were reduced in; an importance
            wanted in front of the first block of a branch.
    """
    view = FAMILY.view(model)
    depth = len(view.served_blocks)
    for method in recipe.methods:
        if not (method.scores_tokens and method.reads_maps and method.place in ("before", "around")):
            continue
        for block in set(view.firsts()[1:]) & set(() if method.layers == "others" else method.resolve_layers(depth)):
            raise ValueError(
                f"{method.name} at block {block} wants an importance carried from the block before, but a branch of "
                f"{type(model).__name__} begins there; leave {block} out of layers"
            )
    stem = "two embeddings of images scaled to sizes of their own"
    refuse_across_stages(type(model).__name__, depth, recipe, view.firsts(), stem)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [("blocks", model.blocks, "hook the blocks of its branches one by one (model.blocks[0].blocks[0][0], ...)")]
    for order, scale in enumerate(model.blocks):
        name = f"blocks.{order}"
        found.append((name, scale, "hook the blocks of its branches one by one, or its projs"))
        for branch, blocks in enumerate(scale.blocks):
            found.append((f"{name}.blocks.{branch}", blocks, "hook its blocks one by one"))
        for index, fusion in enumerate(scale.fusion):
            parts = fusion_names(f"{name}.fusion.{index}", fusion)
            if isinstance(fusion, nn.Sequential):
                found.append((f"{name}.fusion.{index}", fusion, "hook the parts of its blocks"))
            for where, block in parts:
                found.append((where, block, "hook its parts (norm1, attn.proj, drop_path)"))
                found.append((f"{where}.attn", block.attn, "hook its parts (wq, wk, wv, proj)"))
    return found


FAMILY = Family(
    name="crossvit",
    summary="timm crossvit.py: CrossViT, each branch by itself; class tokens are exchanged as published",
    tried="timm 1.0.19 to 1.0.31",
    models={CrossVit: ReducingCrossVit},
    blocks={Block: ReducingVitBlock},
    attentions=REDUCING_ATTENTIONS,
    check=check,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
