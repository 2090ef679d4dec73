"""ToMe: merge the r most similar pairs of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.method import BlockShape, Method, Step
from ..core.registry import register
from ..core.schedule import Remove
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Scans, Traits
from ..maps import MergeMap, TokenMap
from ..ops.matching.bipartite import bipartite_pairs


@register
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Averages the r most similar pairs of tokens in every block, by the keys of attention; training-free.

    Args:
        prop_attn: add the log size of a token to its attention logit (authors: on for supervised weights used off the
            shelf, off for MAE weights used off the shelf).
        mass_pool: average pooling weighs tokens by size (the MAE variant); off is the plain mean of what is left, as
            released for timm models.

    Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 13
    prop_attn: bool = True
    mass_pool: bool = False
    clip: bool = False

    name = "tome"
    source = "Bolya et al., ICLR 2023"
    kind = "merge"
    schedule = Remove()
    traits = Traits(
        sizes=True, proportional=lambda m: m.prop_attn, mass_pool=lambda m: m.mass_pool, scans=Scans()
    )

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        pairs = bipartite_pairs(signals.metric, r, tokens.layout.num_prefix, tokens.valid, tokens.visible)
        return MergeMap.of_pairs(pairs, tokens.length, tokens.sizes())

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        score = (n // 2) * (n - n // 2) * shape.head_dim
        return score + (n - n_out) * shape.dim
