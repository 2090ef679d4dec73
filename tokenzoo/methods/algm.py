"""ALGM: merge alike neighbours early, then alike tokens of the whole image once in the middle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.adaptive import (
    above_threshold,
    even_and_odd,
    hidden_windows,
    merge_pairs,
    merge_windows,
    raster_members,
    window_similarity,
)
from ..core.method import BlockShape, Method, Step
from ..core.options import number, pair, sides
from ..core.registry import register
from ..core.schedule import spread
from ..core.selection import host_ranges
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import MergeMap, TokenMap
from ..ops.attention import full_precision
from ..ops.matching.bipartite import best_odd, bipartite_pairs


class Stage(NamedTuple):
    """What ALGM does in one block.

    Attributes:
        local: merge windows of neighbours; else pairs of the whole image.
        count: windows or pairs to merge, None for as many as the image asks for.
    """

    local: bool
    count: int | None


@register
@dataclass(frozen=True, kw_only=True)
class ALGM(Method):
    """Merges alike windows of neighbours at a first block and alike pairs of the whole image at later ones.

    At the first block each window whose patches have a mean pairwise cosine of at least `threshold` becomes one token;
    at the others every pair above the image's own mean plus deviation / block number merges. The image decides how many
    tokens stay; a batch is padded to its longest image, and images do not influence each other. The longest count is
    read on the host once a block; `r` gives static shapes without that (compile, export). Rest rows and columns where
    windows do not divide the grid stay as they are. Where the patches no longer form the full grid (after another
    reduction), stretches of as many tokens that follow each other in raster order take the place of windows. Meant for
    dense heads; can be used off the shelf, published results are trained with it.

    Args:
        threshold: least mean cosine of a window that merges; above 1 none does.
        window: patches a window, (down, right) or one number for both.
        r: fixed counts instead of thresholds: windows at the first block, pairs at the others; an int or one entry a
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
    traits = Traits(
        positions=True, proportional=lambda m: m.prop_attn, mass_pool=True, decodes_reduced=True, static="r=(20, 40)",
        data_dependent=lambda m: m._open, pads=lambda m: m._open and not m.batch_min,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.r if isinstance(self.r, tuple) else (self.r,):
            if count is not None and (type(count) is not int or count < 0):
                raise ValueError(f"algm: r={self.r!r}; give counts of windows and pairs to merge, or None")

    @property
    def _open(self) -> bool:
        """Whether the image decides some count."""
        return self.r is None or (isinstance(self.r, tuple) and None in self.r)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (0,) if depth == 1 else (0, max(1, depth // 3))

    def strengths(self, depth: int) -> dict[int, Stage]:
        counts = spread(self.r, tuple(sorted(self.resolve_layers(depth))), "algm: r")
        return {i: Stage(i == min(counts), count) for i, count in counts.items() if count != 0}

    # ---- counts

    def _windows(self, patches: int, layout: Layout) -> int:
        """Windows, or stretches where the patches do not form the grid, that can merge."""
        down, right = sides(self.window)
        if patches == layout.num_patches:
            return (layout.grid[0] // down) * (layout.grid[1] // right)
        # n - 1 fewer than there are tokens for: no image with less of them can then be left with more
        return max(0, (patches - down * right + 2) // (down * right))

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        local, count = step.strength
        if count is None:
            return n
        patches = n - layout.num_prefix
        most = self._windows(patches, layout) if local else patches // 2
        if count > most:
            what = "windows" if local else "pairs"
            raise step.error(f"r={count} cannot be reached, at most {most} {what} of {n} tokens can merge; lower r")
        return n - count * (math.prod(sides(self.window)) - 1 if local else 1)

    # ---- the map

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        with torch.no_grad(), full_precision(tokens.x):
            return self._windows_map(tokens, step) if step.strength.local else self._pairs_map(tokens, step)

    def _windows_map(self, tokens: Tokens, step: Step) -> TokenMap | None:
        layout, prefix, size = tokens.layout, tokens.layout.num_prefix, math.prod(sides(self.window))
        members, real = raster_members(tokens, layout, sides(self.window))
        if members.shape[1] == 0:
            return None
        score = window_similarity(tokens.x[:, prefix:], members)
        if tokens.visible is not None:
            gone = step.strength.count is not None or self.threshold <= 1  # above 1, no window may merge
            score = hidden_windows(score, tokens.visible[:, prefix:], members, gone)
        if real is not None:
            score = score.masked_fill(~real, float("-inf"))
        count = step.strength.count
        if count is None:
            counts = (score >= self.threshold).sum(1, keepdim=True)
            plan, merges = self._settle(tokens, counts, size - 1)
            return merge_windows(tokens, members, score, *plan) if merges else None
        length = step.tokens_out(tokens.length, layout)
        counts = torch.full_like(score[:, :1], count, dtype=torch.int64)
        if real is not None:
            counts = torch.minimum(counts, real.sum(1, keepdim=True))
            length = max(length, prefix + count + size - 2)  # images that hold fewer stretches than r
        return merge_windows(tokens, members, score, counts, length, real is not None)

    def _pairs_map(self, tokens: Tokens, step: Step) -> TokenMap | None:
        prefix, count = tokens.layout.num_prefix, step.strength.count
        if tokens.num_patches < 2:
            return None
        if count is not None:
            pairs = bipartite_pairs(tokens.x, count, prefix, tokens.valid, tokens.visible)
            return MergeMap(pairs.order, pairs.src, pairs.slot, tokens.length, tokens.sizes(), valid=pairs.valid)
        value, partner = best_odd(tokens.x, prefix, tokens.valid, tokens.visible)
        real = None if tokens.valid is None else tokens.valid[:, prefix + prefix % 2 :: 2]
        counts = above_threshold(value, real, step.block + 1, self.batch_min, tokens.visible is not None)
        # without a merge, too, tokens take their new places: the next step must not tell whether a batch mate merged
        plan, _ = self._settle(tokens, counts, 1)
        src, dst = even_and_odd(tokens)
        return merge_pairs(tokens, src, dst, value, partner - prefix // 2, *plan, tokens.sizes())

    def _settle(self, tokens: Tokens, counts: Tensor, removed: int) -> tuple[tuple[Tensor, int, bool], bool]:
        """(Merges of each image, longest length, whether lengths differ), and whether anything merges.

        Args:
            tokens: the tokens.
            counts: merges that each image asks for [B, 1].
            removed: tokens that one merge removes.
        """
        if self.batch_min and counts.shape[0]:
            counts = counts.amin(0, keepdim=True).expand_as(counts)
        real = tokens.valid_patches
        left = (tokens.num_patches if real is None else real.unsqueeze(1)) - counts * removed
        found = host_ranges(left, counts)  # the one look of the host at the data
        (least, most), (_, merges) = found if found is not None else ((tokens.num_patches,) * 2, (0, 0))
        return (counts, tokens.layout.num_prefix + most, tokens.valid is not None or least != most), merges > 0

    # ---- cost and strength

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        first = self.r[0] if isinstance(self.r, tuple) else self.r
        if first and n - layout.num_prefix == layout.num_patches:
            return self._windows(layout.num_patches, layout) * shape.dim + (n - n_out) * shape.dim
        return (n // 2) * (n - n // 2) * shape.dim + (n - n_out) * shape.dim  # thresholds: the most it can be

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        left, counts = layout.num_patches, []
        for index in range(len(self.resolve_layers(depth))):
            most = left // 2 if index else self._windows(left, layout)
            counts.append(round(t * most))
            left -= counts[-1] * (1 if index else math.prod(sides(self.window)) - 1)
        return replace(self, r=tuple(counts))
