"""topk: keep the patches that the class token attends to, drop the rest."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.keep_rate import KeepBest
from ..core.method import BlockShape, Step
from ..core.registry import register
from ..core.selection import importance_macs
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..maps import TokenMap


@register
@dataclass(frozen=True, kw_only=True)
class TopK(KeepBest):
    """Keeps the patches with the highest class attention and drops the rest, without fusion.

    Without a class token, patches are ranked by the mean attention they receive.

    Source: the baseline of Haurum et al., "Which Tokens to Use?", ICCV Workshops 2023; EViT without its fused token.
    """

    name = "topk"
    source = "Haurum et al., ICCV-W 2023"
    kind = "prune"

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        return self.best(signals.importance, tokens, step)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return importance_macs(n, shape, layout)
