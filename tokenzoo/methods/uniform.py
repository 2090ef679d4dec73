"""uniform: keep patches at even distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.keep_rate import KeepRate
from ..core.method import Step
from ..core.registry import register
from ..core.schedule import kept_of, kept_patches
from ..core.selection import own_counts, real_rows, with_prefix
from ..core.signals import Signals
from ..core.tokens import Tokens
from ..core.traits import Scans, Traits
from ..maps import KeepMap, TokenMap
from ..ops.rows import stable_order


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(KeepRate):
    """Keeps patches at even distances in the sequence (every k-th for a rate of 1/k): a baseline that looks at nothing.
    """

    name = "uniform"
    source = "baseline"
    kind = "prune"
    traits = Traits(scans=Scans())

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        kept = kept_patches(tokens.length, step, tokens.layout)
        slots = torch.arange(kept, device=tokens.x.device)
        if tokens.visible is not None:
            return self._visible_first(tokens, slots, step)
        counts = own_counts(kept_of(step, tokens.layout), tokens)
        if counts is None:
            # the middle of each of `kept` equal stretches
            patches = ((2 * slots + 1) * tokens.num_patches).div(2 * kept, rounding_mode="floor")
            patches = patches.expand(tokens.x.shape[0], -1)
        else:
            real = tokens.valid_patches.unsqueeze(1)
            patches = ((2 * slots + 1) * real).div(2 * counts.clamp(min=1), rounding_mode="floor")
            patches = patches.clamp(max=tokens.num_patches - 1)
        valid = real_rows(counts, kept, tokens.layout.num_prefix)
        return KeepMap(with_prefix(patches, tokens.layout.num_prefix), tokens.length, valid)

    def _visible_first(self, tokens: Tokens, slots: Tensor, step: Step) -> KeepMap:
        """The same among the patches that no mask hides, all of them and some hidden ones where they are too few."""
        prefix = tokens.layout.num_prefix
        rank = (~tokens.visible[:, prefix:]).long()
        if tokens.valid is not None:
            rank = rank + (~tokens.valid[:, prefix:]).long()
        visible, counts = (rank == 0).sum(1, keepdim=True), own_counts(kept_of(step, tokens.layout), tokens)
        wanted = torch.full_like(visible, slots.shape[0]) if counts is None else counts
        spread = ((2 * slots + 1) * visible).div(2 * wanted.clamp(min=1), rounding_mode="floor")
        nth = torch.where(wanted < visible, spread, slots).clamp(max=tokens.num_patches - 1)
        patches = stable_order(rank).gather(1, nth)
        return KeepMap(with_prefix(patches, prefix), tokens.length, real_rows(counts, slots.shape[0], prefix))
