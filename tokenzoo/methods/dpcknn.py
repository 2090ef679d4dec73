"""DPC-KNN: patches join the nearest density peak and become the mean of its cluster."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.grouping import around_centres
from ..core.keep_rate import KeepRate
from ..core.method import BlockShape, Step
from ..core.options import number
from ..core.registry import register
from ..core.schedule import kept_of, kept_patches
from ..core.selection import keep_patches
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Traits
from ..maps import TokenMap
from ..ops.cells.density import peak_scores
from ..ops.distances import squared_distances


@register
@dataclass(frozen=True, kw_only=True)
class DPCKNN(KeepRate):
    """Averages the patches around each density peak at a few blocks, before attention; training-free.

    Peaks are dense (near their nearest neighbours) and far from denser patches; every patch joins the nearest one. All
    patches of a cluster weigh alike (the published form without its learned weights), and the noise on densities that
    breaks ties in the authors' code is left out. All pairs of patches are compared: one map of distances per block
    that reduces.

    Args:
        neighbours: patches that a density looks at, the patch itself among them; all where there are fewer.
        prop_attn: add the log size of a token to its attention logit (not published).

    Source: Zeng et al., "Not All Tokens Are Equal", CVPR 2022; the form without a learned score: Haurum et al., "Which
    Tokens to Use?", ICCV Workshops 2023.
    """

    neighbours: int = number(5, "give a number of patches, the patch itself among them", least=2, whole=True)
    prop_attn: bool = False

    name = "dpcknn"
    source = "Zeng et al., CVPR 2022"
    kind = "merge"
    traits = Traits(place=BEFORE, proportional=lambda m: m.prop_attn, mass_pool=True)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix = tokens.layout.num_prefix
        if kept_patches(tokens.length, step, tokens.layout) == tokens.num_patches and tokens.valid is None:
            return None
        x = tokens.x[:, prefix:]
        squared = squared_distances(x) / x.shape[2]
        scores = peak_scores(squared, self.neighbours, tokens.seen_patches)
        return around_centres(keep_patches(scores, tokens, kept_of(step, tokens.layout)), squared, tokens)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - layout.num_prefix) ** 2 * shape.dim + (n - n_out) * shape.dim
