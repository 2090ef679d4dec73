"""ToFu: drop matched tokens in early blocks, merge them without loss of norm in later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.method import BlockShape, Method, Step
from ..core.options import choice, number
from ..core.registry import register
from ..core.schedule import Remove
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import KeepMap, MlerpMap, TokenMap
from ..ops.matching.bipartite import bipartite_pairs

_DIVISORS = {"mlerp": "mean", "ports": "head"}


@register
@dataclass(frozen=True, kw_only=True)
class ToFu(Method):
    """Matches tokens as ToMe does; early blocks drop the matched ones, later blocks merge them and keep their norm.

    A merged token is the plain mean of its group, stretched to the norm of the longest member (MLERP). Sizes have no
    part in it, and attention is not proportional.

    Args:
        early: blocks at the front of the model that drop; None for half of them and one more.
        rule: "mlerp", or that of the unofficial "ports", which divide the mean by the norm of the old token instead of
            its own (for comparison: it preserves no norm).

    Source: Kim, Gao, Hsu, Shen, Jin, "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV
    2024.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 13
    early: int | None = number(None, "give a number of blocks, or None", least=0, whole=True, none=True)
    rule: str = choice("mlerp", tuple(_DIVISORS))
    clip: bool = False

    name = "tofu"
    source = "Kim et al., WACV 2024"
    kind = "prune + merge"
    schedule = Remove()
    traits = Traits(either=lambda m, step: step.strength[1])

    def strengths(self, depth: int) -> dict[int, tuple[int, bool]]:
        """(Tokens to remove, whether they are dropped) of every block."""
        early = depth // 2 + 1 if self.early is None else self.early
        counts = self.schedule.strengths(self, self.resolve_layers(depth))
        return {i: (r, i < early) for i, r in counts.items()}

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        n = tokens.length
        r = n - step.tokens_out(n, tokens.layout)
        if r == 0:
            return None
        pairs = bipartite_pairs(signals.metric, r, tokens.layout.num_prefix, tokens.valid, tokens.visible)
        if step.strength[1]:
            return KeepMap(pairs.order, n, pairs.valid)
        return MlerpMap.of_pairs(pairs, n, None, _DIVISORS[self.rule])

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        score = (n // 2) * (n - n // 2) * shape.head_dim
        return score + (0 if step.strength[1] else (n - n_out) * shape.dim)
