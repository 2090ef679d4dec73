"""cluster: replace the map of patches by fewer cluster centres."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..core.method import BlockShape, Method, Step
from ..core.options import centres, choice, number, odd, option, pair
from ..core.registry import register
from ..core.schedule import Schedule
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Place, Traits
from ..maps import ClusterMap, TokenMap
from ..ops.cells.kmeans import cluster, cluster_macs


@register
@dataclass(frozen=True, kw_only=True)
class Cluster(Method):
    """Replaces the patches by the centres of a soft k-means on a coarser grid, after one block; training-free.

    Start: average pooling to the grid. Each step, a token is shared out among the centres of neighbouring cells by its
    distance. The patches have to form their full grid, so no other reduction may come first. Dense features come back
    as a mix of the nearest centres, with the distances that held when clustering; add `reconstruct` to choose where
    and how.

    Args:
        layers: the one block after which to cluster; by default at three eighths of the depth.
        grid: cells (down, right), or one number for both; None for `scale`.
        scale: cells an axis as a share of the patches, rounded, in (0, 1]; 0.7 leaves half of the tokens.
        iterations: k-means steps; 0 is average pooling.
        window: a token sees window x window cells around its own (odd).
        temperature: inverse temperature of the shares, weights exp(-temperature * squared distance). It goes with the
            scale of the features: 0.02 is the authors' for Segmenter ViT-L; about 20 over the usual squared distance of
            neighbouring patches is a place to start from. Too low a value blurs all centres.
        where: "after" or "before" the block.
        prop_attn: add the log size of a centre to its attention logit.
        k: centres that a patch mixes when it is rebuilt (all where there are fewer); -1 for all.

    Source: Liang, Yuan, Ding et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
    Fine-tuning", NeurIPS 2022.
    """

    grid: int | tuple[int, int] | None = pair(None, "both numbers must be at least 1", none=True, both=True)
    scale: float = number(0.7, "give a share of the patches per axis", above=0, most=1)
    iterations: int = number(5, "give a number of steps, 0 for average pooling", least=0, whole=True)
    window: int = option(5, odd)
    temperature: float = number(0.02, "weights are exp(-temperature * squared distance)", above=0)
    where: str = choice("after", ("after", "before"))
    prop_attn: bool = False
    k: int = option(20, centres)

    name = "cluster"
    source = "Liang et al., NeurIPS 2022"
    kind = "merge"
    schedule = Schedule(layers=lambda depth: (depth * 3 // 8,))
    traits = Traits(
        place=lambda m: Place(m.where), positions=True, proportional=lambda m: m.prop_attn, mass_pool=True,
        opens_span=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 1:
            raise ValueError(f"cluster: layers={self.layers!r}; name the one block after which to cluster")

    def strengths(self, depth: int) -> dict[int, Any]:
        full = self.grid is None and self.scale == 1
        return {} if full else {i: self.grid for i in self.resolve_layers(depth)}

    def cells(self, layout: Layout, step: Step) -> tuple[int, int]:
        """Cells (down, right) for the patches of a layout."""
        high, wide = layout.grid
        if self.grid is None:
            return max(1, round(high * self.scale)), max(1, round(wide * self.scale))
        if self.grid[0] > high or self.grid[1] > wide:
            raise step.error(f"grid={self.grid} is larger than the {high} x {wide} patches; give a smaller grid")
        return self.grid

    def count(self, n: int, step: Step, layout: Layout) -> tuple[int, int]:
        """Cells (down, right)."""
        return self.cells(layout, step)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        if n - layout.num_prefix != layout.num_patches:
            raise step.error(
                f"{n - layout.num_prefix} tokens do not form the {layout.grid[0]} x {layout.grid[1]} patches; cluster "
                "before any other reduction"
            )
        down, right = step.count(n, layout)
        return layout.num_prefix + down * right

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        step.tokens_out(tokens.length, tokens.layout)  # grids of other images than the model's own
        if tokens.positions is not None:  # as many tokens as patches, but not in their places
            raise step.error("needs the patches in their grid, but tokens were reduced before; cluster before that")
        cells = step.count(tokens.length, tokens.layout)
        if cells == tokens.layout.grid:
            return None  # nothing to reduce
        size, prefix = tokens.layout.grid, tokens.layout.num_prefix
        visible = None if tokens.visible is None else tokens.visible[:, prefix:]
        found = cluster(tokens.x[:, prefix:], size, cells, self.iterations, self.window, self.temperature, visible)
        return ClusterMap(tokens.x, found, size, cells, prefix, self.k, self.temperature, "l1", visible)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        if n == n_out:
            return 0
        cells = self.cells(layout, Step(self, -1, None))
        return cluster_macs(layout.grid, cells, self.iterations, self.window, shape.dim)

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        high, wide = layout.grid
        ladder = [(high, wide)]
        while ladder[-1] != (1, 1):
            h, w = ladder[-1]
            ladder.append((h - 1, w) if w == 1 or (h > 1 and h * wide > w * high) else (h, w - 1))
        return replace(self, grid=ladder[round(t * (len(ladder) - 1))])
