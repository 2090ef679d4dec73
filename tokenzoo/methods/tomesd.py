"""tomesd: merge in front of a branch, compute on fewer tokens, copy the output back to all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.adaptive import even_and_odd, merge_pairs
from ..core.method import BlockShape, Method, Step
from ..core.options import choice, number, pair, sides
from ..core.registry import register
from ..core.selection import own_counts, raster_order
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..maps import MergeMap, TokenMap
from ..ops.attention import full_precision
from ..ops.draw import fixed_draw
from ..ops.matching.bipartite import best_odd, bipartite_pairs
from ..ops.matching.strided import best_destination, cell_split, split_pairs, stretch_split
from ..ops.rows import stable_order

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
    traits = Traits(place=lambda m: around(*m.branches, once=m.metric == "x"), positions=True)

    def __post_init__(self) -> None:
        branches = (self.branches,) if isinstance(self.branches, str) else tuple(self.branches)
        if not branches or set(branches) - set(BRANCHES) or len(set(branches)) != len(branches):
            raise ValueError(f"tomesd: branches={self.branches!r}; name one or both of {BRANCHES}")
        object.__setattr__(self, "branches", branches)
        super().__post_init__()
        if self.seed is not None and self.stride is None:
            raise ValueError(f"tomesd: seed={self.seed} draws destinations in cells, but stride=None has no cells")

    def strengths(self, depth: int) -> dict[int, float]:
        return {i: self.ratio for i in self.resolve_layers(depth)} if self.ratio > 0 else {}

    # ---- counts

    def _sources(self, patches: int, layout: Layout) -> int:
        """Patches that can merge."""
        if self.stride is not None and patches == layout.num_patches:
            return patches - (layout.grid[0] // sides(self.stride)[0]) * (layout.grid[1] // sides(self.stride)[1])
        return self._in_row(patches)

    def _in_row(self, patches: int) -> int:
        """Patches that can merge where they form no grid."""
        if self.stride is None:
            return patches // 2
        return patches - -(-patches // (sides(self.stride)[0] * sides(self.stride)[1]))

    def _wanted(self, patches: int, layout: Layout) -> int:
        """Patches that the ratio asks to merge."""
        return int((patches + (layout.num_prefix if self.stride is None else 0)) * self.ratio)

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that the ratio asks to merge."""
        return self._wanted(n - layout.num_prefix, layout)

    def tokens_out(self, n: int, step: Step | None, layout: Layout) -> int:
        patches = n - layout.num_prefix
        wanted = self._wanted(patches, layout) if step is None else step.count(n, layout)
        most = self._sources(patches, layout)
        if self.stride is not None and patches == layout.num_patches and most == patches:
            raise step.error(f"stride={self.stride} is larger than the {layout.grid[0]} x {layout.grid[1]} patches")
        if wanted > most and not self.clip:
            raise step.error(
                f"ratio={self.ratio} asks to merge {wanted} tokens, but at most {most} of {n} can; lower it, or set "
                "clip=True to merge what is possible"
            )
        return n - min(wanted, most)

    # ---- the map

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout, n = tokens.layout, tokens.length
        r = n - self.tokens_out(n, step, layout)
        if r == 0:
            return None
        metric = tokens.x if self.metric == "x" else signals.branch_input
        with torch.no_grad(), full_precision(metric):
            if tokens.valid is None:
                if self.stride is None:
                    pairs = bipartite_pairs(metric, r, layout.num_prefix, visible=tokens.visible)
                else:
                    pairs = split_pairs(metric, *self._split(tokens, step), r, layout.num_prefix, tokens.visible)
                return MergeMap(pairs.order, pairs.src, pairs.slot, n)
            return self._padded_map(metric, tokens, n - r, step)

    def _split(self, tokens: Tokens, step: Step) -> tuple[Tensor, Tensor]:
        """Tokens that may merge [B or 1, S] and their destinations [B or 1, D]."""
        layout, device, (down, right) = tokens.layout, tokens.x.device, sides(self.stride)
        if tokens.num_patches == layout.num_patches and tokens.valid is None:
            draw = None
            if self.seed is not None:
                cells = (layout.grid[0] // down) * (layout.grid[1] // right)
                draw = fixed_draw(cells, self.seed * 1009 + step.block, device)
            src, dst = cell_split(layout.grid, (down, right), device, draw)
        else:
            src, dst = stretch_split(tokens.num_patches, down * right, device)
        by_place = raster_order(tokens)
        if by_place is None:
            return src.unsqueeze(0) + layout.num_prefix, dst.unsqueeze(0) + layout.num_prefix
        return by_place[:, src] + layout.num_prefix, by_place[:, dst] + layout.num_prefix

    def _padded_map(self, metric: Tensor, tokens: Tokens, length: int, step: Step) -> TokenMap:
        """Images with padding merge as many tokens as they would alone."""
        layout, receives = tokens.layout, None
        rule = lambda m: m - min(step.count(layout.num_prefix + m, layout), self._sources(m, layout))  # noqa: E731
        counts = (tokens.valid_patches.unsqueeze(1) - own_counts(rule, tokens)).clamp(min=0)
        if self.stride is None:
            src, dst = even_and_odd(tokens)
            value, partner = best_odd(metric, layout.num_prefix, tokens.valid, tokens.visible)
            partner = partner - layout.num_prefix // 2
        else:
            src, dst = self._split(tokens, step)
            if tokens.num_patches == layout.num_patches:  # some images may have all their patches
                src, dst, receives = self._split_by_image(tokens, step, src, dst)
            value, partner = best_destination(metric, src, dst, tokens.valid, tokens.visible, receives)
        length = layout.num_prefix + max(rule(tokens.num_patches), rule(tokens.num_patches - 1))
        return merge_pairs(tokens, src, dst, value, partner, counts, length, True, None, receives)

    def _split_by_image(self, tokens: Tokens, step: Step, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells for images that have all their patches, the given stretches for others; which tokens receive [B, N]."""
        whole = tokens.valid_patches.unsqueeze(1) == tokens.layout.num_patches
        cells = self._split(tokens._replace(valid=None), step)[1].expand(tokens.x.shape[0], -1)
        unset = torch.zeros_like(tokens.valid)
        receives = torch.where(whole, unset.scatter(1, cells, True), unset.scatter(1, dst, True))
        prefix, patches = tokens.layout.num_prefix, tokens.num_patches
        place = stable_order(raster_order(tokens))  # of every patch in raster order
        order = stable_order(receives[:, prefix:].long() * patches + place) + prefix
        most, least = max(cells.shape[1], dst.shape[1]), min(cells.shape[1], dst.shape[1])
        return order[:, : patches - least], order[:, patches - most :], receives

    # ---- cost and strength

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches = n - layout.num_prefix
        wanted, most = self._wanted(patches, layout), self._sources(patches, layout)
        pairs = (n // 2) * (n - n // 2) if self.stride is None else most * (patches - most)
        decisions = 1 if self.matches_once else len(self.branches)
        return decisions * pairs * shape.dim + len(self.branches) * min(wanted, most) * shape.dim

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        counted = layout.num_patches + (layout.num_prefix if self.stride is None else 0)
        return replace(self, ratio=t * self._sources(layout.num_patches, layout) / counted)
