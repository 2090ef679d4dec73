"""mtr: merge the tokens that the scan steps over into their like, in the order of the scan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..core.method import BlockShape, Method, Step
from ..core.mixer_signals import MixerSignals
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Either, RemoveAll, quarters
from ..core.tokens import Layout, Tokens
from ..core.traits import AFTER, Scans, Traits
from ..maps import MergeMap, TokenMap
from ..ops.matching.by_step import group_by_score, group_pairs


@register
@dataclass(frozen=True, kw_only=True)
class MTR(Method):
    """Merges the patches with the smallest steps of the scan into similar patches with larger ones; training-free.

    Score of a patch: its step size, the mean over channels, added up over the directions of the scan. The patches with
    the lowest scores (source) merge into the most similar of those next in rank (target), by the cosine of the residual
    stream; the best ones (keep) stay untouched, and so does the class token. What is left keeps its order.

    The paper's code and tables are not public. Ours are therefore: the blocks and counts, the number of targets, the
    residual stream as what likeness is measured on, and means weighted by size.

    Args:
        r: patches to remove per layer: an int, a list with one entry per layer (missing ones 0), or (r, slope); None
            for 11, unless `keep_rate` is given.
        keep_rate: share of the patches to keep at each layer instead, in (0, 1]; one value or one per layer.
        targets: target patches for every source patch; all others where fewer are left.
        weighted: means count a token by the patches that it stands for; False for plain means of a target and its
            sources.
        layers: blocks to act behind; by default every second one from block 2 on with `r`, and the blocks at one, two
            and three quarters of the depth with `keep_rate`.

    Source: Ma, Zhang, Su, Chen, Song, Zheng, Gao, "Training-free Token Reduction for Vision Mamba", 2025.
    """

    r: int | tuple[Any, ...] | dict[str, Any] | None = None
    keep_rate: float | tuple[float, ...] | None = None
    targets: float = number(2.0, "give target patches for every source patch, such as 2", above=0)
    weighted: bool = True

    name = "mtr"
    source = "Ma et al., 2025"
    kind = "merge"
    schedule = Either(remove=RemoveAll(default=11))
    traits = Traits(place=AFTER, sizes=True, scans=Scans(reads=True, ordered=True))

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(2, depth, 2)) if self.keep_rate is None else quarters(depth)

    def map(self, tokens: Tokens, signals: MixerSignals, step: Step) -> TokenMap | None:
        prefix, patches = tokens.layout.num_prefix, tokens.num_patches
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        groups = group_by_score(signals.step_size[:, prefix:], r, self._targets(r, patches))
        pairs = group_pairs(tokens.x, groups, prefix)
        weight = tokens.sizes() if self.weighted else None
        return MergeMap.of_pairs(pairs, tokens.length, weight)

    def _targets(self, r: int, patches: int) -> int:
        return min(math.ceil(self.targets * r), patches - r)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        r = n - n_out
        return r * (self._targets(r, n - layout.num_prefix) + 1) * shape.dim
