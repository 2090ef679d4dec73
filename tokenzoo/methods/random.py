"""random: keep patches drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.keep_rate import KeepRate
from ..core.method import Step
from ..core.registry import register
from ..core.schedule import kept_of
from ..core.selection import keep_best
from ..core.signals import Signals
from ..core.tokens import Tokens
from ..core.traits import Scans, Traits
from ..maps import TokenMap
from ..ops.draw import fixed_draw


@register
@dataclass(frozen=True, kw_only=True)
class Random(KeepRate):
    """Keeps patches drawn at random: the baseline every method has to beat.

    In training each image gets a new draw from torch's generator. In evaluation the draw is a fixed function of seed,
    block and position: the same on every device, for every batch and after export.

    Args:
        seed: seed of the draw in evaluation.
    """

    seed: int = 0

    name = "random"
    source = "baseline"
    kind = "prune"
    traits = Traits(scans=Scans())

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        if signals.training:
            scores = torch.rand(tokens.x.shape[:2], device=tokens.x.device)
        else:
            scores = fixed_draw(tokens.length, self.seed * 1009 + step.block, tokens.x.device)
            scores = scores.expand(tokens.x.shape[0], -1)
        return keep_best(scores, tokens, kept_of(step, tokens.layout))
