"""cluster: replace the map of patches by fewer cluster centres."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.method import BlockShape, Method, Step
from ..core.options import centres, choice, number, odd, option, pair
from ..core.registry import register
from ..core.schedule import Grid, scaled_cells
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Place, Traits
from ..maps import ClusterMap, TokenMap
from ..ops.cells.kmeans import cluster, cluster_macs, relative_temperature


@register
@dataclass(frozen=True, kw_only=True)
class Cluster(Method):
    """Replaces the patches by the centres of a soft k-means on a coarser grid, after one block; training-free.

    Start: average pooling to the grid. Each step, a token is shared out among the centres of neighbouring cells by its
    distance. The patches have to form their full grid, so no other reduction may come first. Dense features come back
    as a mix of the centres nearest when clustering; add `reconstruct` to choose where and how.

    Args:
        layers: the one block after which to cluster; by default at three eighths of the depth.
        grid: cells (down, right), or one number for both; None for `scale`.
        scale: cells per axis as a share of the patches, rounded, in (0, 1]; 0.7 leaves half of the tokens.
        iterations: k-means steps; 0 is average pooling.
        window: a token sees window x window cells around its own (odd).
        sharpness: inverse temperature of the shares over the mean squared distance of an image's neighbouring patches:
            what that distance counts in the exponent. Too low a value blurs all centres.
        temperature: in place of it, weights exp(-temperature * squared distance). It fits one model: 0.02 is the
            authors' for Segmenter ViT-L, 1.0 for SWAG L/16.
        where: "after" or "before" the block.
        k: centres that a patch mixes when it is rebuilt (all where there are fewer); -1 for all.

    Source: Liang, Yuan, Ding et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
    Fine-tuning", NeurIPS 2022.
    """

    grid: int | tuple[int, int] | None = pair(None, "both numbers must be at least 1", none=True, both=True)
    scale: float = number(0.7, "give a share of the patches per axis", above=0, most=1)
    iterations: int = number(5, "give a number of steps, 0 for average pooling", least=0, whole=True)
    window: int = option(5, odd)
    sharpness: float = number(10.0, "give what the usual squared distance of neighbours counts", above=0)
    temperature: float | None = number(None, "weights are exp(-temperature * squared distance)", above=0, none=True)
    where: str = choice("after", ("after", "before"))
    prop_attn: bool = False
    k: int = option(20, centres)

    name = "cluster"
    source = "Liang et al., NeurIPS 2022"
    kind = "merge"
    schedule = Grid(
        layers=lambda depth: (depth * 3 // 8,), cells=lambda m, layout: scaled_cells(m.scale, layout),
        size=lambda m: m.grid or (None if m.scale == 1 else m.scale), remedy="cluster before any other reduction",
    )  # fmt: skip
    traits = Traits(
        place=lambda m: Place(m.where), positions=True, proportional=lambda m: m.prop_attn, mass_pool=True,
        opens_span=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != 1:
            raise ValueError(f"cluster: layers={self.layers!r}; name the one block after which to cluster")

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        cells = self.schedule.of(tokens, step)
        if cells == tokens.layout.grid:
            return None  # nothing to reduce
        size, prefix = tokens.layout.grid, tokens.layout.num_prefix
        visible = None if tokens.visible is None else tokens.visible[:, prefix:]
        patches = tokens.x[:, prefix:]
        temperature = self.temperature or relative_temperature(patches, size, self.sharpness, visible)
        found = cluster(patches, size, cells, self.iterations, self.window, temperature, visible)
        return ClusterMap(tokens.x, found, size, cells, prefix, self.k, temperature, "l1", visible)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        if n == n_out:
            return 0
        return cluster_macs(layout.grid, self.schedule.count(n, step, layout), self.iterations, self.window, shape.dim)
