"""DPC-KNN: patches join the nearest density peak and become the mean of its cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from ..core.grouping import around_centres
from ..core.keep_rate import KeepRate
from ..core.learned import Learned
from ..core.method import BlockShape, Step
from ..core.options import number
from ..core.registry import register
from ..core.schedule import kept_of, kept_patches
from ..core.selection import keep_patches
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Traits
from ..maps import ReplaceMap, TokenMap
from ..ops.cells.density import peak_scores
from ..ops.distances import squared_distances


@register
@dataclass(frozen=True, kw_only=True)
class DPCKNN(Learned, KeepRate):
    """Averages the patches around each density peak at a few blocks, before attention.

    Peaks are dense (near their nearest neighbours) and far from denser patches; every patch joins the nearest one. All
    patches of a cluster weigh alike, which needs no training, or as a learned score says. The noise on densities that
    breaks ties in the authors' code is left out. All pairs of patches are compared: one map of distances per block
    that reduces.

    Args:
        neighbours: patches that a density looks at, the patch itself among them; all where there are fewer.
        learned: weigh the patches of a cluster by the exponential of a score, one linear layer per block that has to be
            trained (as published).
        prop_attn: add the log size of a token to its attention logit (not published).

    Source: Zeng et al., "Not All Tokens Are Equal", CVPR 2022; the form without a learned score: Haurum et al., "Which
    Tokens to Use?", ICCV Workshops 2023.
    """

    neighbours: int = number(5, "give a number of patches, the patch itself among them", least=2, whole=True)
    learned: bool = False
    prop_attn: bool = False

    name = "dpcknn"
    source = "Zeng et al., CVPR 2022"
    kind = "merge"
    traits = Traits(place=BEFORE, proportional=lambda m: m.prop_attn, mass_pool=True)
    gates = False
    released = {"cluster_layers.{stage}.": ""}

    def module(self, dim: int, step: Step) -> nn.Module | None:
        return nn.ModuleDict({"score": nn.Linear(dim, 1)}) if self.learned else None

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix = tokens.layout.num_prefix
        if kept_patches(tokens.length, step, tokens.layout) == tokens.num_patches and tokens.valid is None:
            return None
        x = tokens.x[:, prefix:]
        squared = squared_distances(x) / x.shape[2]
        scores = peak_scores(squared, self.neighbours, tokens.seen_patches)
        centres = keep_patches(scores, tokens, kept_of(step, tokens.layout))
        if not self.learned:
            return around_centres(centres, squared, tokens)
        weight = F.pad(signals.module["score"](x).float().exp(), (0, 0, prefix, 0), value=1.0)
        groups = around_centres(centres, squared, tokens, weight)
        total = groups.pool(weight)[:, prefix:]  # as published, weights of a cluster sum to a little less than 1
        return ReplaceMap(groups, groups.apply(tokens.x)[:, prefix:] * (total / (total + 1e-6)).to(x.dtype))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches = n - layout.num_prefix
        return patches * (patches + self.learned) * shape.dim + (n - n_out) * shape.dim
