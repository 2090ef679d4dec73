"""tomesd: merge in front of a branch, compute on fewer tokens, copy the output back to all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.destinations import by_cells, merge_by_image
from ..core.method import BlockShape, Method, Step
from ..core.options import choice, number, pair, sides
from ..core.registry import register
from ..core.schedule import Share
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..maps import MergeMap, TokenMap
from ..ops.attention import full_precision
from ..ops.draw import fixed_draw
from ..ops.matching.bipartite import bipartite_pairs
from ..ops.matching.strided import split_pairs

BRANCHES = ("attention", "mlp")
METRICS = ("x", "normed")


@register
@dataclass(frozen=True, kw_only=True)
class ToMeSD(Method):
    """Merges tokens around a branch only: every token reads the output of the one it merged into; training-free.

    The residual stream keeps its length, so every tap and every head works as before, and sizes play no part. One patch
    of each cell of the grid is a destination, all others may merge into their most similar one; patches where no whole
    cell fits can only merge. Where the patches no longer form the full grid (after another reduction), stretches of as
    many tokens that follow each other in raster order take the place of cells. `stride=None` pairs even with odd tokens
    as ToMe does; with metric="normed", branches=("attention", "mlp") and clip=True that is the dense form of ToMe in
    the repositories of Liang et al., NeurIPS 2022.

    Args:
        ratio: share of the patches (with stride=None of all tokens) to merge, in [0, 1).
        stride: size of a cell, (down, right) or one number for both; None pairs even with odd tokens.
        branches: branches to merge around: "attention", "mlp".
        metric: similarity is that of the block's input, decided once for all branches ("x"), or of the tokens that each
            branch reads, behind its norm ("normed").
        seed: draws the destination of each cell, in another way in every block; None takes the top left patch.
        clip: merge fewer where the ratio exceeds what can merge, instead of refusing.

    Source: Bolya, Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
    """

    ratio: float = number(0.5, "give the share of the tokens to merge, such as 0.5", least=0, below=1)
    stride: int | tuple[int, int] | None = pair(
        2, "use 2 or more, or None", area=2, none=True, fault="makes cells of one patch"
    )
    branches: tuple[str, ...] = ("attention",)
    metric: str = choice("x", METRICS)
    seed: int | None = number(None, "give a whole number, or None for the top left patch", whole=True, none=True)
    clip: bool = False

    name = "tomesd"
    source = "Bolya & Hoffman, CVPR-W 2023"
    kind = "merge"
    schedule = Share()
    traits = Traits(place=lambda m: around(*m.branches, once=m.metric == "x"), positions=True)

    def __post_init__(self) -> None:
        branches = (self.branches,) if isinstance(self.branches, str) else tuple(self.branches)
        if not branches or set(branches) - set(BRANCHES) or len(set(branches)) != len(branches):
            raise ValueError(f"tomesd: branches={self.branches!r}; name one or both of {BRANCHES}")
        object.__setattr__(self, "branches", branches)
        super().__post_init__()
        if self.seed is not None and self.stride is None:
            raise ValueError(f"tomesd: seed={self.seed} draws destinations in cells, but stride=None has no cells")

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout, n = tokens.layout, tokens.length
        r = n - self.tokens_out(n, step, layout)
        if r == 0:
            return None
        metric, cell = tokens.x if self.metric == "x" else signals.branch_input, self.stride and sides(self.stride)
        with torch.no_grad(), full_precision(metric):
            draw = None
            if self.seed is not None and tokens.num_patches == layout.num_patches:
                cells = (layout.grid[0] // cell[0]) * (layout.grid[1] // cell[1])
                draw = fixed_draw(cells, self.seed * 1009 + step.block, metric.device)
            if tokens.valid is not None:
                return merge_by_image(tokens, metric, lambda m: self.schedule.left(m, step, layout), cell, draw)
            if cell is None:
                pairs = bipartite_pairs(metric, r, layout.num_prefix, visible=tokens.visible)
            else:
                pairs = split_pairs(metric, *by_cells(tokens, cell, draw), r, layout.num_prefix, tokens.visible)
            return MergeMap.of_pairs(pairs, n)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches = n - layout.num_prefix
        wanted, most = self.schedule.wanted(self, patches, layout), self.schedule.sources(self, patches, layout)
        pairs = (n // 2) * (n - n // 2) if self.stride is None else most * (patches - most)
        decisions = 1 if self.matches_once else len(self.branches)
        return decisions * pairs * shape.dim + len(self.branches) * min(wanted, most) * shape.dim
