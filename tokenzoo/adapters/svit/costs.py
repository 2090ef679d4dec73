"""Multiply-adds of SViT by formula: all stages, the way to the grid and back around every depthwise convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ...core.method import BlockShape, Step
from ...core.recipe import Recipe
from ...core.tokens import Layout
from ...models.svit.blocks import halved
from ...ops.cells.super_tokens import SLOTS
from ...ops.layer_macs import conv_macs, linear_macs
from ..block import BlockMacs
from ..costs import block_cost, inside_branch
from .blocks import ReducingSuperTokenBlock as Reducing

_KERNEL = 9  # places under a depthwise kernel
_SEEN = 25  # cells that a token gives a share to where tokens are clustered softly


class StageCost(NamedTuple):
    """What the formulas need of one stage.

    Attributes:
        blocks: (multiply-adds, sizes, fused) of blocks that methods see; none in stages with super tokens.
        hidden: channels inside the MLPs.
        grid: places (high, wide).
        whole: multiply-adds of all blocks in a stage that methods do not see.
        down: multiply-adds of the convolution behind the stage.
    """

    blocks: tuple[tuple[BlockMacs, BlockShape, bool], ...]
    hidden: int
    grid: tuple[int, int]
    whole: int
    down: int


class SvitCosts(NamedTuple):
    """Everything about a model that counting needs, read once.

    Attributes:
        stages: the stages.
        stem: multiply-adds of the stem.
        project: multiply-adds of the projection, a token.
        head: multiply-adds of the classifier.
        head_pools: the classifier sees one pooled vector.
    """

    stages: tuple[StageCost, ...]
    stem: int
    project: int
    head: int
    head_pools: bool

    def rows(self, recipe: Recipe | None, layout: Layout) -> list[tuple[str, str, int, int, int, int, str]]:
        """Name, methods, tokens in and out, multiply-adds, those of reduction, and attention path of every row.

        Stem and stages in front of block 0 are the row "embed"; what halves the map behind a stage that methods see,
        and every later stage that they do not see, have rows of their own.

        Args:
            recipe: None for the unpatched model.
            layout: the sequence that block 0 sees.
        """
        firsts, depth = {}, 0
        for index, stage in enumerate(self.stages):
            if stage.blocks:
                firsts[index], depth = depth, depth + len(stage.blocks)
        layouts = {first: layout._replace(grid=self.stages[index].grid) for index, first in firsts.items()}
        counts = [[] for _ in range(depth)]
        if recipe is not None:
            counts = recipe.token_counts(depth, layouts[0], layouts)
        embed, rows = self.stem, []
        trace: list[tuple[Step, int, int]] = []
        for index, stage in enumerate(self.stages):
            n = places = stage.grid[0] * stage.grid[1]
            trace = []
            if not stage.blocks and not rows:
                embed += stage.whole + stage.down
                continue
            if not stage.blocks:
                rows.append((f"layers.{index}", "", n, n, stage.whole + stage.down, 0, ""))
                continue
            if not rows:
                rows.append(("embed", "", n, n, embed, 0, ""))
            for offset in range(len(stage.blocks)):
                block, shape_layout = firsts[index] + offset, layouts[firsts[index]]
                row, n = self._block(stage, offset, counts[block], n, shape_layout, recipe, trace)
                rows.append((f"blocks.{block}", *row))
            if stage.down:
                back = _way_back(trace, stage.blocks[-1][1].dim, stage.blocks[-1][1].dim, recipe)
                after = halved(stage.grid)
                rows.append((f"layers.{index}.downsample", "", n, after[0] * after[1], stage.down + back, back, ""))
        restored = any(s.method.place == "norm" and s.method.closes_span for steps in counts for s, _, _ in steps)
        n = places if restored and any(s.method.opens_span for s, _, _ in trace) else n
        head = self.project * n + self.head * (1 if self.head_pools else n)
        return [*rows, ("head", "", n, n, head, 0, "")]

    def _block(
        self,
        stage: StageCost,
        offset: int,
        steps: list[tuple[Step, int, int]],
        n: int,
        layout: Layout,
        recipe: Recipe | None,
        trace: list[tuple[Step, int, int]],
    ) -> tuple[tuple[str, int, int, int, int, str], int]:
        """The row of a block behind its name, and tokens after it; steps that reduce go onto the trace."""
        macs, shape, fused = stage.blocks[offset]
        path = _path(fused, trace, recipe)
        places, dim = layout.num_patches, shape.dim
        extra = _to_grid_and_back(trace, dim, dim, recipe)  # the positional convolution
        after, total, reduction = block_cost(macs, shape, steps, n, layout)
        before_mlp = n
        for step, before, left in steps:
            if step.method.place in ("after", "norm"):
                continue
            before_mlp = left
            _note(trace, step, before, left)
        around = [found for found in steps if found[0].method.place == "around"]
        inside = inside_branch("mlp", around, before_mlp, layout)
        extra += _to_grid_and_back(trace, dim, stage.hidden, recipe)
        if inside is not None:
            extra += (before_mlp - inside) * stage.hidden
        if recipe is not None and recipe.fill.kind == "stash":  # hidden values of dropped tokens
            extra += sum(_dropped(*found) for found in trace) * dim * stage.hidden
        for step, before, left in steps:
            if step.method.place in ("after", "norm"):
                _note(trace, step, before, left)
        own = _KERNEL * places * (dim + stage.hidden)
        names = ", ".join(step.method.name for step, _, _ in steps)
        return (names, n, after, total + own + extra, reduction + extra, path), after


def _path(fused: bool, trace: list[tuple[Step, int, int]], recipe: Recipe | None) -> str:
    """The attention path of a block behind the reductions of its stage so far."""
    found = (
        ["log-size bias"]
        if recipe is not None and recipe.proportional and any(step.method.merges for step, _, _ in trace)
        else []
    )
    found += ["padding mask"] if any(step.method.pads for step, _, _ in trace) else []
    return ("fused" if fused else "unfused") + (", " + " and ".join(found) if found else "")


def _note(trace: list[tuple[Step, int, int]], step: Step, before: int, after: int) -> None:
    """Keeps the steps that are still in force: restoring takes those of its span off."""
    if step.method.closes_span:
        openings = [i for i, found in enumerate(trace) if found[0].method.opens_span]
        if openings:
            del trace[openings[-1] :]
    elif step.method.place != "around":
        trace.append((step, before, after))


def _dropped(step: Step, before: int, after: int) -> int:
    """Tokens without one that stands for them; where images differ, all are looked at."""
    if "prune" not in step.method.kind:
        return 0
    if step.method.pads:
        return before
    return before - after + ("fuse" in step.method.kind and before != after)


def _way_back(trace: list[tuple[Step, int, int]], dim: int, width: int, recipe: Recipe | None) -> int:
    """Multiply-adds of giving every place a value of some width, where the residual stream has dim channels."""
    macs = 0
    for step, before, after in trace:
        if step.method.opens_span:
            macs += before * after * (dim + width)  # distances to the centres, and the mix
        elif recipe is not None and recipe.fill.kind == "nearest":
            macs += _dropped(step, before, after) * after * dim
    return macs


def _to_grid_and_back(trace: list[tuple[Step, int, int]], dim: int, width: int, recipe: Recipe | None) -> int:
    """`_way_back`, and of giving the tokens what a convolution made of the values."""
    macs = _way_back(trace, dim, width, recipe)
    if all(step.method.kind == "prune" for step, _, _ in trace):
        return macs
    nearest = recipe is not None and recipe.fill.kind == "nearest"
    if not any(step.method.opens_span or (nearest and _dropped(step, n, out)) for step, n, out in trace):
        return macs + trace[0][1] * width  # one weighted sum over all places
    for step, before, after in trace:
        if step.method.opens_span:
            macs += before * min(after, _SEEN) * width
        elif step.method.merges:
            macs += (before if "fuse" in step.method.kind else before - after) * width
    return macs


def read_svit_costs(model: nn.Module, grid: tuple[int, int]) -> SvitCosts:
    """Reads what the formulas need off a model, patched or not.

    Args:
        model: the model.
        grid: places (high, wide) of the first stage.
    """
    stages, full = [], tuple(grid)
    for stage in model.layers:
        blocks = tuple((Reducing.macs(b), Reducing.shape(b), Reducing.fused.fget(b)) for b in stage.blocks)
        hidden = stage.blocks[0].mlp2.hidden
        whole = sum(_super_token_block(block, grid) for block in stage.blocks)
        smaller = halved(grid)
        down = 0
        if not isinstance(stage.downsample, nn.Identity):
            down = conv_macs(stage.downsample.proj[0]) * smaller[0] * smaller[1]
        stages.append(StageCost(blocks if stage.is_plain else (), hidden, (grid[0], grid[1]), whole, down))
        grid = smaller
    convs = [macs for layer in model.patch_embed.proj if (macs := conv_macs(layer))]
    stem = (convs[0] + convs[1]) * 4 + convs[2] + convs[3]
    project = conv_macs(model.proj)
    pools = bool(model.global_pool.pool_type)
    return SvitCosts(tuple(stages), stem * full[0] * full[1], project, linear_macs(model.head), pools)


def _super_token_block(block: nn.Module, grid: tuple[int, int]) -> int:
    """Multiply-adds of a block that attends among super tokens."""
    macs, attn = Reducing.macs(block), block.attn
    dim, places = block.norm2.num_features, grid[0] * grid[1]
    down, right = (-(-length // side) for length, side in zip(grid, attn.stoken_size))
    cells, padded = down * right, down * right * attn.stoken_size[0] * attn.stoken_size[1]
    # nine products a place and channel: to find its shares, to collect, once more to read back
    rounds = (2 * attn.n_iter + 1 if attn.n_iter else 2) * SLOTS * padded * dim
    among = cells * (macs.qk + macs.v + macs.out) + cells * cells * macs.pair
    return rounds + among + places * (macs.mlp + _KERNEL * (dim + block.mlp2.hidden))
