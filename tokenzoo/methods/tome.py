"""ToMe: merge the r most similar pairs of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..core.method import BlockShape, Method, Step
from ..core.registry import register
from ..core.schedule import even_removal, removed_per_layer
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..maps import MergeMap, TokenMap
from ..ops.matching.bipartite import bipartite_pairs


@register
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Averages the r most similar pairs of tokens in every block, by the keys of attention; training-free.

    Args:
        r: tokens to remove a block: an int, a list with one entry a block (missing ones 0), or (r, slope), see
            `tokenzoo.core.schedule.removed_per_layer`. With `layers` given, entries are for those blocks.
        prop_attn: add the log size of a token to its attention logit (authors: on for supervised weights used off the
            shelf, off for MAE weights used off the shelf).
        mass_pool: average pooling weighs tokens by size (the MAE variant); off is the plain mean of what is left, as
            released for timm models.
        clip: merge fewer where r exceeds half of the tokens, instead of refusing.
        layers: blocks to act in, all by default.

    Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 13
    prop_attn: bool = True
    mass_pool: bool = False
    clip: bool = False

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "Bolya et al., ICLR 2023"
    kind: ClassVar[str] = "merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.r
        if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
            r = {"r": r[0], "slope": r[1]}
        object.__setattr__(self, "r", tuple(r) if isinstance(r, list) else r)
        removed_per_layer(self.r, 1000)  # reports a form or sign that is not understood

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    @property
    def mass_weighted_pool(self) -> bool:
        return self.mass_pool

    @property
    def uses_size(self) -> bool:
        return True

    @property
    def serves_scans(self) -> bool:
        return True

    def strengths(self, depth: int) -> dict[int, int]:
        layers = self.resolve_layers(depth)
        return {i: r for i, r in zip(layers, removed_per_layer(self.r, len(layers))) if r > 0}

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        most = (n - layout.num_prefix) // 2
        if step.strength > most and not self.clip:
            raise step.error(
                f"r={step.strength} cannot be reached, at most {most} of {n} tokens can merge; lower r, give a list "
                "with one r a block, or set clip=True to merge what is possible"
            )
        return n - min(step.strength, most)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        pairs = bipartite_pairs(signals.metric, r, tokens.layout.num_prefix, tokens.valid, tokens.visible)
        return MergeMap(pairs.order, pairs.src, pairs.slot, tokens.length, tokens.sizes(), valid=pairs.valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        score = (n // 2) * (n - n // 2) * shape.head_dim
        return score + (n - n_out) * shape.dim

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        layers = self.resolve_layers(depth)
        left, counts = layout.num_patches, []
        for r in even_removal(t, layout.num_patches // 2, len(layers)):
            counts.append(min(r, left // 2))
            left -= counts[-1]
        return replace(self, r=tuple(counts))
