"""Mixture-of-Depths: in some blocks, the patches that a router weighs highest run, and the others go around."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from ..core.keep_rate import KeepRate
from ..core.learned import Learned
from ..core.method import BlockShape, Step
from ..core.registry import register
from ..core.schedule import Keep, kept_of, truncated
from ..core.selection import keep_counts, own_counts
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..layers.router import TanhRouter
from ..maps import RoutedMap, TokenMap


def _every_second(depth: int) -> range:
    """Blocks 1, 3, 5, and so on, without the last one, whose patches a class token does not read any more."""
    return range(1, max(2, depth - 1), 2)


@register
@dataclass(frozen=True, kw_only=True)
class MoD(Learned, KeepRate):
    """Lets the best patches by a learned router through a block, and the others around it; all are there again behind.

    Weights and routing are p-MoD's, taken from a language model to a ViT block (ours): w = 1 + 0.2 tanh(linear(x)); a
    patch that runs gets its attention output, and w times its MLP output; one that is skipped becomes w x. The router
    learns through w; a count is fixed, so training runs as inference does. Prefix tokens always run, at weight 1. A
    new router weighs all patches alike, so that a model has to be trained with it before it is of use.

    Source: Raposo, Ritter, Richards et al., "Mixture-of-Depths", 2024; Zhang, Meng, Lu et al., "p-MoD: Building
    Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025 (weights, `tokenzoo.schedules.decayed_keep_rates`).
    """

    keep_rate: float | tuple[float, ...] = 0.5

    name = "mod"
    source = "Raposo et al., 2024; Zhang et al., ICCV 2025"
    kind = "attend less"
    schedule = Keep(layers=_every_second, rounding=truncated)
    traits = Traits(place=around("attention", "mlp", once=True))
    gates = False

    def module(self, dim: int, step: Step) -> nn.Module:
        return TanhRouter(dim)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap:
        prefix = tokens.layout.num_prefix
        weight = F.pad(signals.module(tokens.x[:, prefix:]), (prefix, 0), value=1.0)
        count = kept_of(step, tokens.layout)
        # of patches that weigh the same, as all do for a new router, the first ones, however long a batch is
        kept = keep_counts(weight, tokens, own_counts(count, tokens), count(tokens.num_patches))
        return RoutedMap(kept.idx, tokens.length, weight, tokens.x, kept.valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - layout.num_prefix) * shape.dim
