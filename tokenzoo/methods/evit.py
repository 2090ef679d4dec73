"""EViT: keep the patches that the class token attends to, fuse the rest into one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.fusing import fuse, left_out
from ..core.keep_rate import MASS, KeepBest
from ..core.method import BlockShape, Step
from ..core.registry import register
from ..core.schedule import kept_patches
from ..core.selection import importance_macs
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import TokenMap


@register
@dataclass(frozen=True, kw_only=True)
class EViT(KeepBest):
    """Keeps the patches with the highest class attention and fuses the rest into one attention-weighted token.

    A fused token is an ordinary candidate at later layers. Without a class token, patches are ranked and weighted by
    the mean attention they receive. The keep rate can be changed between steps with `tokenzoo.update_method`; the
    authors' warm-up is `tokenzoo.core.schedule.cosine_keep_rate`.

    Args:
        fuse_token: append the weighted sum of the dropped patches (weights are not normalised, as published).

    Source: Liang, Ge, Tong, Song, Wang, Xie, "Not All Patches are What You Need", ICLR 2022.
    """

    fuse_token: bool = True

    name = "evit"
    source = "Liang et al., ICLR 2022"
    kind = "prune + fuse"
    traits = Traits(reads_maps=True, mixes=lambda m: m.fuse_token, **MASS)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        patches = n - layout.num_prefix
        kept = kept_patches(n, step, layout)
        return n if kept == patches else layout.num_prefix + kept + self.fuse_token

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        importance = signals.importance
        keep = self.best(importance, tokens, step)
        if keep is None or not self.fuse_token:
            return keep
        gone = left_out(keep, tokens)
        # the weights carry gradient, the choice does not
        return fuse(keep, torch.where(gone, importance, torch.zeros_like(importance)), gone)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        fused = (n - layout.num_prefix) * shape.dim if self.fuse_token else 0
        return importance_macs(n, shape, layout) + fused
