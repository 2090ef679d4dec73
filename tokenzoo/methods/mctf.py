"""MCTF: merge tokens that are similar, uninformative and small, one step ahead of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..core.method import BlockShape, Method, Step
from ..core.registry import register
from ..core.schedule import even_removal, removed_per_layer, spread
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..maps import MergeMap, TokenMap
from ..ops.matching.two_way import fusion_pairs

POOLINGS = ("size", "attention", "max", "mean")
_PLACES = {0: "after", 1: "ahead", 2: "before"}


@register
@dataclass(frozen=True, kw_only=True)
class MCTF(Method):
    """Merges tokens by three criteria (similarity, little attention received, small size), in both directions.

    One step ahead (1, published): tokens merge before attention, by the map that attention is about to use, and that
    map is reused. No map is stored: merged values are lifted back, fused attention runs at the old length, and its
    output rows are averaged, which is the same. Only pooling="max" one step ahead computes maps, a head at a time.

    Args:
        r: tokens to remove a block: an int, a list, (r, slope), or a share of the tokens below 1 (0.35).
        prop_attn: add the log size of a token to its attention logit.
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
    one_step_ahead: int = 1
    tau_sim: float = 1
    tau_info: float = 20
    tau_size: float = 40
    bidirectional: bool = True
    pooling: str = "attention"
    min_tokens: int = 10
    clip: bool = False

    name: ClassVar[str] = "mctf"
    source: ClassVar[str] = "Lee et al., CVPR 2024"
    kind: ClassVar[str] = "merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.r
        if isinstance(r, tuple) and len(r) == 2 and type(r[0]) is int and isinstance(r[1], float):
            r = {"r": r[0], "slope": r[1]}
        object.__setattr__(self, "r", tuple(r) if isinstance(r, list) else r)
        if isinstance(self.r, float):
            if not 0 <= self.r < 1:
                raise ValueError(f"mctf: r={self.r}; a share must lie in [0, 1), a count must be a whole number")
        else:
            removed_per_layer(self.r, 1000)
        if self.pooling not in POOLINGS:
            raise ValueError(f"mctf: pooling={self.pooling!r}; use one of {', '.join(POOLINGS)}")
        if self.one_step_ahead not in _PLACES:
            raise ValueError(f"mctf: one_step_ahead={self.one_step_ahead!r}; use 0, 1 or 2")
        for field in ("tau_sim", "tau_info", "tau_size"):
            if getattr(self, field) < 0:
                raise ValueError(f"mctf: {field}={getattr(self, field)} is negative; use 0 to switch the criterion off")

    @property
    def place(self) -> str:
        return _PLACES[self.one_step_ahead]

    @property
    def reads_attention(self) -> bool:
        return True

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    @property
    def mass_weighted_pool(self) -> bool:
        return True

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))

    def strengths(self, depth: int) -> dict[int, Any]:
        layers = self.resolve_layers(depth)
        if isinstance(self.r, float):
            return spread(self.r, layers, "mctf: r") if self.r > 0 else {}
        return {i: r for i, r in zip(layers, removed_per_layer(self.r, len(layers))) if r > 0}

    def _most(self, n: int, num_prefix: int) -> int:
        """Tokens that can be removed of n."""
        return max(0, min((n - num_prefix) // 2, n - self.min_tokens))

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens that the strength asks to remove."""
        return int((n - layout.num_prefix) * step.strength) if isinstance(step.strength, float) else step.strength

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        asked, half = step.count(n, layout), (n - layout.num_prefix) // 2
        # the released code bounds counts, but not shares, by the tokens that have to stay
        most = half if isinstance(step.strength, float) else self._most(n, layout.num_prefix)
        if asked > most and not self.clip:
            raise step.error(
                f"r={step.strength} cannot be reached, at most {most} of {n} tokens can merge (half of them, and "
                f"{self.min_tokens} stay); lower r, give a list with one r a block, or set clip=True"
            )
        return n - min(asked, most)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        n, prefix = tokens.length, tokens.layout.num_prefix
        r = n - step.tokens_out(n, tokens.layout)
        if r == 0:
            return None
        with torch.no_grad():
            received = signals.attention_received
            size = tokens.sizes()
            own_r = None
            if tokens.valid is not None:
                table = [min(r, step.count(i, tokens.layout), self._most(i, prefix)) for i in range(n + 1)]
                own_r = torch.tensor(table, device=size.device).clamp(min=0)[tokens.valid.sum(1)].unsqueeze(1)
            pairs = fusion_pairs(
                tokens.x.detach(), received, tokens.size, r, prefix, (self.tau_sim, self.tau_info, self.tau_size),
                self.bidirectional, tokens.valid, own_r, tokens.visible,
            )  # fmt: skip
            weight = {"attention": received.unsqueeze(-1) * size, "size": size}.get(self.pooling)
        reduce = "max" if self.pooling == "max" else "mean"
        return MergeMap(pairs.order, pairs.src, pairs.slot, n, weight, reduce, pairs.valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        received = n * n * shape.num_heads * shape.head_dim
        score = (n // 2) * (n - n // 2) * shape.dim
        return received + score + 2 * (n - n_out) * shape.dim

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        left, counts = layout.num_prefix + layout.num_patches, []
        blocks = len(self.resolve_layers(depth))
        for r in even_removal(t, layout.num_patches // 2, blocks):
            counts.append(min(r, self._most(left, layout.num_prefix)))
            left -= counts[-1]
        return replace(self, r=tuple(counts))
