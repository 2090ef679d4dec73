"""ALGM: merge alike neighbours early, then alike tokens of the whole image once in the middle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adaptive import even_and_odd, merge_pairs, merge_windows, settle
from ..core.method import BlockShape, Method, Step
from ..core.options import number, pair, sides
from ..core.registry import register
from ..core.schedule import Stage, Stages, open_counts
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..core.windows import raster_members
from ..maps import MergeMap, TokenMap
from ..ops.attention import full_precision
from ..ops.cells.windows import hidden_windows, window_similarity
from ..ops.matching.bipartite import best_odd, bipartite_pairs
from ..ops.matching.threshold import above_threshold

__all__ = ["ALGM", "Stage"]


@register
@dataclass(frozen=True, kw_only=True)
class ALGM(Method):
    """Merges alike windows of neighbours at a first block and alike pairs of the whole image at later ones.

    At the first block each window whose patches have a mean pairwise cosine of at least `threshold` becomes one token;
    at the others every pair above the image's own mean plus deviation / block number merges. The image decides how many
    tokens stay; a batch is padded to its longest image, and images do not influence each other. The longest count is
    read on the host once per block; `r` gives static shapes without that (compile, export). Rest rows and columns where
    windows do not divide the grid stay as they are. Where the patches no longer form the full grid (after another
    reduction), stretches of as many tokens that follow each other in raster order take the place of windows. Meant for
    dense heads; can be used off the shelf, published results are trained with it.

    Args:
        threshold: least mean cosine of a window that merges; above 1 none does.
        window: patches per window, (down, right) or one number for both.
        r: fixed counts instead of thresholds: windows at the first block, pairs at the others; an int or one entry per
            layer.
        batch_min: all images of a batch merge as many as the one that merges least, and share the threshold of pairs
            (the released behaviour).
        prop_attn: add the log size of a token to its attention logit (off as released).
        layers: the block of windows and those of pairs; by default the first and one after a third of the depth.

    Source: Norouzi, Orlova, de Geus, Dubbelman, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic
    Segmentation with Plain Vision Transformers", CVPR 2024.
    """

    threshold: float = number(0.88, "give a cosine such as 0.88")
    window: int | tuple[int, int] = pair(2, "use 2 or more", area=2, fault="holds no two patches")
    r: int | tuple[int, ...] | None = None
    batch_min: bool = False
    prop_attn: bool = False

    name = "algm"
    source = "Norouzi et al., CVPR 2024"
    kind = "merge"
    schedule = Stages(layers=lambda depth: (0,) if depth == 1 else (0, max(1, depth // 3)))
    traits = Traits(
        positions=True, proportional=lambda m: m.prop_attn, mass_pool=True, decodes_reduced=True, static="r=(20, 40)",
        data_dependent=lambda m: open_counts(m.r), pads=lambda m: open_counts(m.r) and not m.batch_min,
    )  # fmt: skip

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        with torch.no_grad(), full_precision(tokens.x):
            return self._windows_map(tokens, step) if step.strength.local else self._pairs_map(tokens, step)

    def _windows_map(self, tokens: Tokens, step: Step) -> TokenMap | None:
        prefix, size, count = tokens.layout.num_prefix, math.prod(sides(self.window)), step.strength.count
        members, real = raster_members(tokens, sides(self.window))
        if members.shape[1] == 0:
            return None
        score = self._likeness(tokens, members, real, count)
        if count is None:
            plan = settle(tokens, (score >= self.threshold).sum(1, keepdim=True), size - 1, self.batch_min)
            return merge_windows(tokens, members, score, *plan[:3]) if plan.merges else None
        length, counts = step.tokens_out(tokens.length, tokens.layout), torch.full_like(score[:, :1], count).long()
        if real is not None:
            counts = torch.minimum(counts, real.sum(1, keepdim=True))
            length = max(length, prefix + count + size - 2)  # images that hold fewer stretches than r
        return merge_windows(tokens, members, score, counts, length, real is not None)

    def _likeness(self, tokens: Tokens, members: Tensor, real: Tensor | None, count: int | None) -> Tensor:
        """Mean cosine of every window [B, W], -inf for those that hold padding."""
        prefix, visible = tokens.layout.num_prefix, tokens.visible
        score = window_similarity(tokens.x[:, prefix:], members)
        if visible is not None:
            gone = count is not None or self.threshold <= 1  # above 1, no window may merge
            score = hidden_windows(score, visible[:, prefix:], members, gone)
        return score if real is None else score.masked_fill(~real, float("-inf"))

    def _pairs_map(self, tokens: Tokens, step: Step) -> TokenMap | None:
        prefix, count = tokens.layout.num_prefix, step.strength.count
        if tokens.num_patches < 2:
            return None
        if count is not None:
            pairs = bipartite_pairs(tokens.x, count, prefix, tokens.valid, tokens.visible)
            return MergeMap.of_pairs(pairs, tokens.length, tokens.sizes())
        value, partner = best_odd(tokens.x, prefix, tokens.valid, tokens.visible)
        real = None if tokens.valid is None else tokens.valid[:, prefix + prefix % 2 :: 2]
        counts = above_threshold(value, real, step.block + 1, self.batch_min, tokens.visible is not None)
        # without a merge, too, tokens take their new places: the next step must not tell whether a batch mate merged
        plan = settle(tokens, counts, 1, self.batch_min)
        return merge_pairs(tokens, *even_and_odd(tokens), value, partner - prefix // 2, *plan[:3], tokens.sizes())

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        first = self.r[0] if isinstance(self.r, tuple) else self.r
        scores = (n // 2) * (n - n // 2)  # with thresholds: the most it can be
        if first and n - layout.num_prefix == layout.num_patches:
            scores = self.schedule.windows(self, layout.num_patches, layout)
        return (scores + n - n_out) * shape.dim
