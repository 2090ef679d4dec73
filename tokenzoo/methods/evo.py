"""evo: informative tokens take the whole block, the others follow one token that represents them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.fusing import fuse, left_out
from ..core.method import BlockShape, Method, Step
from ..core.mixins import Companion
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Keep
from ..core.selection import importance_macs, keep_best
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..maps import TokenMap

_LEAST = 1e-12


@register
@dataclass(frozen=True, kw_only=True)
class Evo(Companion, Method):
    """Sends the most important tokens through the block; all others gain what one token that represents them gains.

    Importance is class attention, blended from block to block; the representative is the mean of the other tokens by
    importance. No token leaves: the sequence keeps its length and order, so heads, taps and dense decoders work as
    before. Blocks before the first of `layers` run in full and only gather importance. Without a class token it is the
    mean attention received. Drop path and LayerScale act on the representative as on any token.

    Args:
        keep_rate: share of the patches that take the block, in (0, 1]; one value or one per layer; rounded down.
        blend: share of a block's own attention in the carried importance, in (0, 1].
        layers: blocks to act in, block 0 excluded; by default all after the first third.

    Source: Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022, as in the light
    models of Li et al., "UniFormer", TPAMI 2023.
    """

    keep_rate: float | tuple[float, ...] = 0.5
    blend: float = number(0.5, "1 forgets earlier blocks", above=0, most=1)

    name = "evo"
    source = "Xu et al., AAAI 2022"
    kind = "slow-fast"
    schedule = Keep(layers=lambda depth: range(max(1, depth // 3), depth), lowest=1.5)
    traits = Traits(place=around("attention", "mlp", once=True, stream=True), reads_maps=True, carries=True)

    def strengths(self, depth: int) -> dict[int, tuple[float, bool]]:
        """(share of the patches that take the block, whether a later block wants importance) of every block."""
        layers = self.resolve_layers(depth)
        if 0 in layers:
            raise ValueError(
                "evo: layers names block 0, where no importance is known yet; begin at block 1 or later (blocks before "
                "the first one run in full and gather it)"
            )
        slow = {i: rate for i, (rate, _) in self.schedule.strengths(self, layers).items()}
        return {i: (slow.get(i, 1.0), i < max(slow)) for i in range(max(slow) + 1)} if slow else {}

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        own = self._merged(depth) if self.layers != "others" else set()
        for other in methods:
            if other is self or other.layers == "others":
                continue
            if other.closes_span and other.place != "maps" and min(other.strengths(depth)) < max(own, default=0):
                raise ValueError(
                    f"evo carries importance from block to block, which {other.name} at block "
                    f"{min(other.strengths(depth))} does not rebuild; let evo act in earlier blocks only"
                )
            if other.place != "around":
                continue
            both = sorted(own & (other._merged(depth) if isinstance(other, Evo) else set(other.strengths(depth))))
            if both:
                raise ValueError(
                    f"evo and {other.name} both merge around the branches of block {both[0]}; give them different "
                    "layers"
                )

    def _merged(self, depth: int) -> set[int]:
        """Blocks that not all patches take; in the others importance is gathered."""
        return {i for i, (rate, _) in self.strengths(depth).items() if rate < 1}

    def count(self, n: int, step: Step, layout: Layout) -> tuple[int, bool]:
        """Patches that take the block, and whether a later block wants importance."""
        return int((n - layout.num_prefix) * step.strength[0]), step.strength[1]

    def _split(self, n: int, step: Step, layout: Layout) -> int:
        slow, _ = step.count(n, layout)
        if slow < 1:
            raise step.error(f"keep_rate={step.strength[0]} leaves none of {n - layout.num_prefix} patches; raise it")
        return slow

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        slow = self._split(n, step, layout)
        return n if slow >= n - layout.num_prefix else layout.num_prefix + slow + 1

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout = tokens.layout
        if self._split(tokens.length, step, layout) == tokens.num_patches:
            return None  # so it is for every image, however many of its tokens are padding
        scores = tokens.scores
        if scores is None:
            raise step.error("no importance has been carried here; call the model, not its blocks out of order")
        keep = keep_best(scores, tokens, lambda n: step.count(layout.num_prefix + n, layout)[0])
        gone = left_out(keep, tokens)
        counts = gone if tokens.visible is None else gone & tokens.visible
        # differential attention can be negative; where nothing is important, all count alike
        weight = torch.where(counts, scores.clamp(min=0) + _LEAST, torch.zeros_like(scores))
        return fuse(keep, weight / weight.sum(1, keepdim=True).clamp(min=_LEAST), gone)

    def carry(self, tokens: Tokens, signals: Signals, token_map: TokenMap | None, step: Step) -> Tensor | None:
        before = tokens.scores
        if not step.count(tokens.length, tokens.layout)[1]:
            return before
        seen = signals.importance
        if token_map is not None:
            seen = token_map.lift(seen.unsqueeze(-1)).squeeze(-1)
        if before is None:
            return seen
        blended = (1 - self.blend) * before + self.blend * seen
        return blended if token_map is None else torch.where(token_map.dropped, before, blended)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        inside = self.tokens_out(n, step, layout)
        # the representative is formed once per branch
        scoring = importance_macs(inside, shape, layout) if step.strength[1] else 0
        return scoring + (0 if inside == n else 2 * n * shape.dim)
