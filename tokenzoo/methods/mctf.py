"""MCTF: merge tokens that are similar, uninformative and small, one step ahead of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.method import BlockShape, Method, Step
from ..core.options import choice, number
from ..core.registry import register
from ..core.schedule import Remove
from ..core.selection import own_counts
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import AFTER, AHEAD, BEFORE, Traits
from ..maps import MergeMap, TokenMap
from ..ops.matching.two_way import fusion_pairs

POOLINGS = ("size", "attention", "max", "mean")
_PLACES = {0: AFTER, 1: AHEAD, 2: BEFORE}
_OFF = "use 0 to switch the criterion off"


def _most(method: MCTF, n: int, num_prefix: int) -> int:
    """Tokens that can be removed of n: the released code bounds counts, not shares, by those that have to stay."""
    return max(0, min((n - num_prefix) // 2, n - method.min_tokens))


@register
@dataclass(frozen=True, kw_only=True)
class MCTF(Method):
    """Merges tokens by three criteria (similarity, little attention received, small size), in both directions.

    One step ahead (1, published): tokens merge before attention, by the map that attention is about to use, and that
    map is reused. No map is stored: merged values are lifted back, fused attention runs at the old length, and its
    output rows are averaged, which is the same. Only pooling="max" one step ahead computes maps, a head at a time.

    Args:
        r: tokens to remove per block: an int, a list, (r, slope), or a share of the tokens below 1 (0.35).
        one_step_ahead: 1 reuses the map, 2 merges first and attends anew (precise), 0 merges at the end of the block.
        tau_sim: temperature of similarity; 0 switches the criterion off.
        tau_info: temperature of attention received; 0 switches it off.
        tau_size: temperature of size; 0 switches it off.
        bidirectional: half of r from even to odd tokens, the rest back.
        pooling: weights of a merge: "attention" (received, times size), "size", "mean" or "max" (elementwise).
        min_tokens: tokens that stay at least.
        clip: merge fewer where r exceeds what the rules allow, instead of refusing.
        layers: blocks to act in; by default all but the first.

    Source: Lee, Choi, Kim, "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
    Transformers", CVPR 2024.
    """

    r: int | float | tuple[Any, ...] | dict[str, Any] = 16
    prop_attn: bool = True
    one_step_ahead: int = choice(1, tuple(_PLACES))
    tau_sim: float = number(1, _OFF, least=0)
    tau_info: float = number(20, _OFF, least=0)
    tau_size: float = number(40, _OFF, least=0)
    bidirectional: bool = True
    pooling: str = choice("attention", POOLINGS)
    min_tokens: int = 10
    clip: bool = False

    name = "mctf"
    source = "Lee et al., CVPR 2024"
    kind = "merge"
    schedule = Remove(
        layers=lambda depth: range(1, depth), limit=_most, shares=True,
        why=lambda m: f" (half of them, and {m.min_tokens} stay)",
    )  # fmt: skip
    traits = Traits(
        place=lambda m: _PLACES[m.one_step_ahead], reads_attention=True, reads_maps=True,
        proportional=lambda m: m.prop_attn, mass_pool=True,
    )  # fmt: skip

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        n, prefix = tokens.length, tokens.layout.num_prefix
        r = n - step.tokens_out(n, tokens.layout)
        if r == 0:
            return None
        with torch.no_grad():
            received, size = signals.attention_received, tokens.sizes()
            own_r = own_counts(
                lambda m: min(r, step.count(prefix + m, tokens.layout), _most(self, prefix + m, prefix)), tokens
            )
            pairs = fusion_pairs(
                tokens.x.detach(), received, tokens.size, r, prefix, (self.tau_sim, self.tau_info, self.tau_size),
                self.bidirectional, tokens.valid, own_r, tokens.visible,
            )  # fmt: skip
            # attention that is a difference of two maps can be negative, which no mean can be weighted by
            weight = {"attention": received.clamp(min=0).unsqueeze(-1) * size, "size": size}.get(self.pooling)
        reduce = "max" if self.pooling == "max" else "mean"
        return MergeMap.of_pairs(pairs, n, weight, reduce, complete=False)  # maps that subtract leave some unmatched

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        received = n * n * shape.entry
        score = (n // 2) * (n - n // 2) * shape.dim
        return received + score + 2 * (n - n_out) * shape.dim
