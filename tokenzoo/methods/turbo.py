"""Turbo: merge similar tokens, but none that the class token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.method import BlockShape, Method, Step
from ..core.mixins import Companion
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Remove, half_of
from ..core.selection import importance_macs
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import MergeMap, TokenMap
from ..ops.matching.bipartite import bipartite_pairs

_SCALE = 30  # of the penalty, as released


@register
@dataclass(frozen=True, kw_only=True)
class Turbo(Companion, Method):
    """Averages the most similar pairs as ToMe does, with a penalty on merging away tokens of high class attention.

    The penalty says which tokens merge, never into which. Without a class token it is the mean attention received.

    Args:
        alpha: weight of the penalty, 30 alpha times class attention; 0 is ToMe. Authors: 1 for BLIP, 5 for LLaVA.
        beta: base of a change over the blocks that merge: block n of them weighs beta ** |gamma - n|; 1 for none.
        gamma: the block of them that weighs most where beta is below 1, counted from 0.
        min_tokens: blocks that fewer tokens enter are left alone, prefix tokens included (40 as released).

    Source: Ju, Wang, Cheng, et al., "Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large
    Models", ECCV 2024.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 16
    alpha: float = number(1.0, "0 is ToMe", least=0)
    beta: float = number(1.0, "1 weighs all blocks alike", above=0)
    gamma: float = number(0, "give the number of a block", least=0)
    min_tokens: int = number(40, "0 merges however few there are", least=0, whole=True)
    prop_attn: bool = True
    clip: bool = False

    name = "turbo"
    source = "Ju et al., ECCV 2024"
    kind = "merge"
    schedule = Remove(limit=lambda m, n, prefix: half_of(m, n, prefix) if n >= m.min_tokens else 0)
    traits = Traits(reads_maps=True, sizes=True, proportional=lambda m: m.prop_attn)

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        padding = [other.name for other in methods if other.pads]
        if padding and self.min_tokens:
            raise ValueError(
                f"turbo: min_tokens={self.min_tokens} counts the tokens of a whole batch, but {padding[0]} leaves each "
                "image a number of its own; set min_tokens=0"
            )

    def strengths(self, depth: int) -> dict[int, tuple[int, float]]:
        """(Tokens to remove, weight of the penalty) of every block that merges."""
        counts = self.schedule.strengths(self, self.resolve_layers(depth))
        weight = _SCALE * self.alpha
        return {i: (r, weight * self.beta ** abs(self.gamma - n)) for n, (i, r) in enumerate(sorted(counts.items()))}

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n if n < self.min_tokens else self.schedule.tokens_out(n, step, layout)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        penalty = step.strength[1] * signals.importance.detach()
        pairs = bipartite_pairs(signals.metric, r, tokens.layout.num_prefix, tokens.valid, tokens.visible, penalty)
        return MergeMap.of_pairs(pairs, tokens.length, tokens.sizes())

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        if n == n_out:
            return 0
        return importance_macs(n, shape, layout) + (n // 2) * (n - n // 2) * shape.head_dim + (n - n_out) * shape.dim
