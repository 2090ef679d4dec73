"""random: keep patches drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..maps import TokenMap
from ..registry import register
from ..selection import keep_best
from ..signals import Signals
from ..tokens import Tokens
from ._keep_rate import KeepRate
from .base import Step

_PRIME = 2_147_483_647


@register
@dataclass(frozen=True, kw_only=True)
class Random(KeepRate):
    """Keeps patches drawn at random: the baseline every method has to beat.

    In training each image gets a new draw from torch's generator. In evaluation the draw is a fixed function of seed,
    block and position: the same on every device, for every batch and after export.

    Args:
        seed: seed of the draw in evaluation.
        keep_rate: share of the patches to keep at each layer, in (0, 1]; one value or one a layer.
        tokens: patches to keep instead, an int or one entry a layer.
        layers: blocks to act in; by default at one, two and three quarters of the depth.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "baseline"
    kind: ClassVar[str] = "prune"

    @property
    def serves_scans(self) -> bool:
        return True

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        if signals.training:
            scores = torch.rand(tokens.x.shape[:2], device=tokens.x.device)
        else:
            scores = fixed_draw(tokens.length, self.seed * 1009 + step.block, tokens.x.device)
            scores = scores.expand(tokens.x.shape[0], -1)
        return keep_best(scores, tokens, self.kept(step, tokens.layout))


def fixed_draw(length: int, seed: int, device: torch.device) -> Tensor:
    """Pseudo-random scores [length] from integers alone: equal on every device, traceable, exportable."""
    x = torch.arange(1, length + 1, device=device) * 7919 + (seed % 100_003) * 104_729 + 12_345
    for factor in (48_271, 69_621, 39_373):
        x = (x % _PRIME) * factor % _PRIME
        x = x * x % _PRIME  # squaring leaves the lattice of a plain congruential generator
    return x.double() / _PRIME
