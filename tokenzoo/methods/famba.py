"""famba: merge similar tokens in front of the scan, in some of the blocks only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..core.method import BlockShape, Step
from ..core.mixer_signals import MixerSignals
from ..core.registry import register
from ..core.remove_count import RemoveCount
from ..core.tokens import Layout, Tokens
from ..core.traits import AHEAD, Scans, Traits
from ..maps import MergeMap, TokenMap
from ..ops.matching.bipartite import bipartite_pairs
from ..ops.matching.ordered import sort_pairs

STRATEGIES = ("all", "alternate", "lower:k", "upper:k")
_STRATEGY = re.compile(r"all|alternate|(lower|upper):[1-9]\d*")


@register
@dataclass(frozen=True, kw_only=True)
class FambaV(RemoveCount):
    """Averages the r most similar pairs of tokens in front of the scan of some blocks of a scanning model.

    Similarity is that of what the mixer reads, between tokens at even and at odd places, class tokens in front; means
    are plain, so that a token that has merged twice counts once. Published for training with fewer tokens; the authors
    find that merging in the upper blocks alone costs the least accuracy.

    Args:
        strategy: "all" blocks, "alternate" (those with an odd index), "lower:k" (blocks 0 to k - 1) or "upper:k"
            (block k and all above). The released code turns the last two around.
        ordered: tokens stay in the order of the scan; False gives [unmerged even, odd], as released.
        clip: merge fewer where r exceeds half of the tokens, as released, instead of refusing.
        layers: blocks to act in, in place of a strategy.

    Source: Shen, Wan, Wang, Zhang, "Famba-V: Fast Vision Mamba with Cross-Layer Token Fusion", ECCV 2024 workshops.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 7
    strategy: str = "all"
    ordered: bool = True

    name = "famba"
    source = "Shen et al., ECCV 2024 workshops"
    kind = "merge"
    # tokens stay in order, or are asked not to
    traits = Traits(place=AHEAD, scans=Scans(reads=True, values=False, ordered=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.strategy, str) or not _STRATEGY.fullmatch(self.strategy):
            raise ValueError(
                f"famba: strategy={self.strategy!r}; use one of {', '.join(STRATEGIES)}, k from 1, such as 'upper:18'"
            )
        if self.layers is not None and self.strategy != "all":
            raise ValueError(f"famba: strategy={self.strategy!r} and layers={self.layers} both name blocks; give one")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        kind, _, k = self.strategy.partition(":")
        if not k:
            return tuple(range(1, depth, 2)) if kind == "alternate" else tuple(range(depth))
        if int(k) > depth - (kind == "upper"):
            raise ValueError(f"famba: strategy={self.strategy!r}, but the model has blocks 0 to {depth - 1}; lower k")
        return tuple(range(int(k)) if kind == "lower" else range(int(k), depth))

    def map(self, tokens: Tokens, signals: MixerSignals, step: Step) -> TokenMap | None:
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        pairs = bipartite_pairs(signals.normed, r, tokens.layout.num_prefix)
        pairs = sort_pairs(pairs) if self.ordered else pairs
        return MergeMap.of_pairs(pairs, tokens.length)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        score = (n // 2) * (n - n // 2) * shape.dim
        return score + 2 * (n - n_out) * shape.dim  # stream and input of the mixer both merge
