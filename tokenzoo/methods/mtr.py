"""mtr: merge the tokens that the scan steps over into their like, in the order of the scan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.mixer_signals import MixerSignals
from ..core.registry import register
from ..core.schedule import even_removal, keep_count, removed_per_layer, spread
from ..core.tokens import Layout, Tokens
from ..maps import MergeMap, TokenMap
from ..ops.matching.by_step import group_by_score, group_pairs

_DEFAULT_R = 11


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
        r: patches to remove a layer: an int, a list with one entry a layer (missing ones 0), or (r, slope); None for
            11, unless `keep_rate` is given.
        keep_rate: share of the patches to keep at each layer instead, in (0, 1]; one value or one a layer.
        targets: target patches for every source patch; all others where fewer are left.
        weighted: means count a token by the patches that it stands for; False for plain means of a target and its
            sources.
        layers: blocks to act behind; by default every second one from block 2 on with `r`, and the blocks at one, two
            and three quarters of the depth with `keep_rate`.

    Source: Ma, Zhang, Su, Chen, Song, Zheng, Gao, "Training-free Token Reduction for Vision Mamba", 2025.
    """

    r: int | tuple[Any, ...] | dict[str, Any] | None = None
    keep_rate: float | tuple[float, ...] | None = None
    targets: float = 2.0
    weighted: bool = True

    name: ClassVar[str] = "mtr"
    source: ClassVar[str] = "Ma et al., 2025"
    kind: ClassVar[str] = "merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.keep_rate is not None:
            raise ValueError(f"mtr: r={self.r} and keep_rate={self.keep_rate} both say how much to remove; give one")
        r = self.r
        if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
            r = {"r": r[0], "slope": r[1]}
        object.__setattr__(self, "r", tuple(r) if isinstance(r, list) else r)
        if r is not None:
            removed_per_layer(self.r, 1000)  # reports a form or sign that is not understood
        rates = tuple(self.keep_rate) if isinstance(self.keep_rate, list) else self.keep_rate
        object.__setattr__(self, "keep_rate", rates)
        for rate in rates if isinstance(rates, tuple) else () if rates is None else (rates,):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)):
                raise TypeError(f"mtr: keep_rate={rates!r}; give a number in (0, 1] or one a layer")
            if not 0 < rate <= 1:
                raise ValueError(f"mtr: keep_rate={rate} is outside (0, 1]; 0.7 keeps 70 % of the patches")
        if isinstance(self.targets, bool) or not isinstance(self.targets, (int, float)) or not self.targets > 0:
            raise ValueError(f"mtr: targets={self.targets!r}; give target patches for every source patch, such as 2")
        if not isinstance(self.weighted, bool):
            raise TypeError(f"mtr: weighted={self.weighted!r}; give True or False")

    @property
    def place(self) -> str:
        return "after"

    @property
    def uses_size(self) -> bool:
        return True

    @property
    def serves_scans(self) -> bool:
        return True

    @property
    def reads_scan(self) -> bool:
        return True

    @property
    def keeps_order(self) -> bool:
        return True

    # ---- where and how much

    def default_layers(self, depth: int) -> tuple[int, ...]:
        if self.keep_rate is None:
            return tuple(range(2, depth, 2))
        return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))

    def strengths(self, depth: int) -> dict[int, tuple[float | None, int | None]]:
        layers = self.resolve_layers(depth)
        if self.keep_rate is not None:
            rates = spread(self.keep_rate, layers, "mtr: keep_rate")
            return {i: (rate, None) for i, rate in rates.items() if rate < 1}
        counts = removed_per_layer(_DEFAULT_R if self.r is None else self.r, len(layers))
        return {i: (None, r) for i, r in zip(layers, counts) if r > 0}

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        patches = n - layout.num_prefix
        rate, r = step.strength
        if rate is not None:
            return layout.num_prefix + keep_count(rate, patches)
        if r >= patches:
            raise step.error(
                f"r={r} leaves none of {patches} patches to merge into; lower r, or give a list with one r a layer"
            )
        return n - r

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        if self.keep_rate is not None:
            return replace(self, keep_rate=1 - t * (1 - 0.5 / layout.num_patches))
        layers = self.resolve_layers(depth)
        left, counts = layout.num_patches, []
        for r in even_removal(t, layout.num_patches - 1, len(layers)):
            counts.append(min(r, left - 1))
            left -= counts[-1]
        return replace(self, r=tuple(counts))

    # ---- the map

    def map(self, tokens: Tokens, signals: MixerSignals, step: Step) -> TokenMap | None:
        prefix, patches = tokens.layout.num_prefix, tokens.num_patches
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        groups = group_by_score(self.scores(signals)[:, prefix:], r, self._targets(r, patches))
        pairs = group_pairs(tokens.x, groups, prefix)
        weight = tokens.sizes() if self.weighted else None
        return MergeMap(pairs.order, pairs.src, pairs.slot, tokens.length, weight)

    def _targets(self, r: int, patches: int) -> int:
        return min(math.ceil(self.targets * r), patches - r)

    @torch.no_grad()
    def scores(self, signals: MixerSignals) -> Tensor:
        """Mean step size of every token, added up over the directions [B, N] float32.

        Args:
            signals: view of the scan that ran.
        """
        return sum(signals.scanned("delta", way).float().mean(-1) for way in range(signals.directions))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        r = n - n_out
        return r * (self._targets(r, n - layout.num_prefix) + 1) * shape.dim
