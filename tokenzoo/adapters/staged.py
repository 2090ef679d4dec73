"""Models whose blocks stand in stages of fewer and fewer places: methods act inside of stages, each begins anew.

At the end of a stage every place of its grid gets a value back (dropped ones what the recipe's `fill` says). The
model's own layer between two stages makes a smaller grid of them, and the next stage begins with all of that. Behind
the last stage, the head sees the tokens that are left. Only an importance that a method carries from block to block
goes along, summed over the places that become one. Blocks are numbered through the stages in order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.lift import lift
from ..core.recipe import Recipe
from ..core.tokens import Layout, Tokens
from ..maps import RestoreMap
from .flow import Flow
from .grid_costs import way_back
from .model import ReducingModel
from .on_grid import from_map, to_map
from .walk import Beside


class StagedModel(ReducingModel):
    """Mixin of such models; a family says which blocks a stage has, and what stands between two stages."""

    takes_added = False
    takes_gates = False

    # ---- spelled by the family

    def stages_of_blocks(self) -> list[tuple[nn.Module, ...]]:
        """The blocks of every stage."""
        raise NotImplementedError

    def between(self, x: Tensor, stage: int, grid: tuple[int, int]) -> Tensor:
        """What a stage begins with [B, P + N', C'], of the tokens at all places of the one before it.

        Args:
            x: [B, P + N, C], prefix in front.
            stage: the stage that begins.
            grid: places (high, wide) of the one before.
        """
        raise NotImplementedError

    def between_macs(self, stage: int, grid: tuple[int, int]) -> int:
        """Multiply-adds of `between`."""
        raise NotImplementedError

    def stage_width(self, stage: int) -> int:
        """Channels of the residual stream of a stage."""
        raise NotImplementedError

    between_name: str  # name of the layer in front of stage i, with {}

    def between_label(self, stage: int) -> str:
        """Name of the layer in front of a stage, for a report."""
        return self.between_name.format(stage)

    # ---- the sequences

    @property
    def served_blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of all stages in order."""
        return tuple(block for blocks in self.stages_of_blocks() for block in blocks)

    def firsts(self) -> list[int]:
        """The first block of every stage."""
        counts = [len(blocks) for blocks in self.stages_of_blocks()]
        return [sum(counts[:stage]) for stage in range(len(counts))]

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        (layout,) = super().sequences(grid, recipe).values()
        found = {}
        for first in self.firsts():
            found[first] = layout._replace(grid=tuple(grid), keep_values=True)
            grid = halved(grid)
        return found

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, Any]:
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} takes no attn_mask: its stages have grids of their own, and no mask fits all "
                "of them; call the model without one"
            )
        return super().start(x, None, trace=True, dense=True)

    def restart(self, tokens: Tokens, index: int, context: Any) -> Tokens:
        firsts = self.firsts()
        if index not in firsts:
            return tokens
        grid = tokens.layout.grid
        x = self.between(self.all_places(tokens), firsts.index(index), grid)
        grid = halved(grid)
        scores = [carried(held, tokens, grid) for held in (tokens.scores, *tokens.more_scores)]
        return Tokens(
            x, tokens.layout._replace(grid=grid), trace=(), scores=scores[0], more_scores=tuple(scores[1:]),
            records=tokens.records,
        )  # fmt: skip

    def all_places(self, tokens: Tokens) -> Tensor:
        """Values of a stage at all of its places [B, P + N, C]."""
        recipe = self.tokenzoo_recipe
        return lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill) if tokens.trace else tokens.x

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        firsts = self.firsts()
        if index + 1 not in firsts:
            return []
        stage, grid, prefix = firsts.index(index + 1), flow.layout.grid, flow.layout.num_prefix
        dim = self.stage_width(stage - 1)
        back = way_back(flow.held_behind, dim, dim, flow)
        smaller = halved(grid)
        macs = self.between_macs(stage, grid) + back
        return [Beside(self.between_label(stage), flow.left, prefix + smaller[0] * smaller[1], macs, back)]

    # ---- outputs

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's `forward_intermediates`; all maps are lifted to the full grid of their stage.

        Args:
            x: images [B, C, H, W].
            indices: stages; a number takes the last ones, None all.
            norm: changes nothing, as in timm: maps are handed out as they leave their stage.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.

        Raises:
            ValueError: another format.
        """
        from timm.models._features import feature_take_indices

        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: {type(self).__name__} hands out maps; leave it at 'NCHW'")
        firsts = [*self.firsts(), len(self.served_blocks)]
        wanted, last = feature_take_indices(len(firsts) - 1, indices)
        stop = firsts[last + 1] - 1 if stop_early else len(self.served_blocks) - 1
        maps = []
        for index, tokens in self._left(self.walk(x, last=stop)):
            if index + 1 in firsts[1:] and firsts.index(index + 1) - 1 in wanted:
                patches = self.all_places(tokens)[:, tokens.layout.num_prefix :]
                maps.append(to_map(patches, tokens.layout.grid).contiguous())
        if intermediates_only:
            return maps
        whole = stop == len(self.served_blocks) - 1
        return self.features(self._finish(tokens) if whole else tokens), maps


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """Places that a step of two leaves of a grid."""
    return (grid[0] - 1) // 2 + 1, (grid[1] - 1) // 2 + 1


def carried(scores: Tensor | None, tokens: Tokens, grid: tuple[int, int]) -> Tensor | None:
    """An importance of tokens [B, N] that is carried along, for the next stage: summed over its places."""
    if scores is None:
        return None
    layout, scores = tokens.layout, scores.unsqueeze(-1)
    if tokens.trace:  # the importance of a token is shared out among the places it stands for
        maps = tuple(step.map for step in tokens.trace)
        scores = RestoreMap(0, maps, (None,) * len(maps)).pool(scores)
    prefix, patches = scores[:, : layout.num_prefix], scores[:, layout.num_prefix :]
    means = from_map(F.adaptive_avg_pool2d(to_map(patches, layout.grid), grid))
    patches = means * (layout.num_patches / (grid[0] * grid[1]))
    return torch.cat([prefix, patches], dim=1).squeeze(-1)


def refuse_across_stages(name: str, depth: int, recipe: Recipe, firsts: list[int], stem: str) -> None:
    """Refuses recipes that reach over the end of a stage, or in front of the first one.

    Args:
        name: name of the model's class.
        depth: its blocks.
        recipe: the recipe.
        firsts: first block of every stage that methods act in.
        stem: what embeds images, for the message.

    Raises:
        ValueError: a method embeds images of half the size; one rebuilds at a block of another stage than it was
            reduced in.
    """
    opened = {
        max(first for first in firsts if first <= block)
        for method in recipe.methods
        if method.opens_span and method.layers != "others"
        for block in method.resolve_layers(depth)
    }
    for method in recipe.methods:
        if method.place == "embed":
            raise ValueError(
                f"{method.name} embeds images at half the size, which {name}'s {stem} cannot do; use a model whose "
                "patches are one convolution"
            )
        if method.closes_span and method.place == "after" and opened:
            (block,) = method.resolve_layers(depth)
            if max(first for first in firsts if first <= block) not in opened:
                raise ValueError(
                    f"{method.name} at block {block} comes after the stage that was reduced has ended, where {name} "
                    f"rebuilds its tokens in any case; its stages with plain attention begin at the blocks {firsts}"
                )
