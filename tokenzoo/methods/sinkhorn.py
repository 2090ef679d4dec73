"""Sinkhorn: an optimal transport plan shares all patches out among learned centres."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.learned_slots import LearnedSlots
from ..core.method import Step
from ..core.options import number
from ..core.registry import register
from ..layers.slots import SinkhornCentres


@register
@dataclass(frozen=True, kw_only=True)
class Sinkhorn(LearnedSlots):
    """Shares all patches out among learned centres by optimal transport, in front of a few blocks; has to be trained.

    The plan holds a weight for all pairs of patches and centres. How many tokens there are is part of the weights: the
    same at any image size. New tokens are sums of patches brought to unit length, so that a model has to learn to go on
    without their lengths. Centres are compared at unit
    length; the authors' code brings the parameter itself to it, in every pass.

    Args:
        keep_rate: share of the patches to keep at each layer, in (0, 1]; rates multiply up, int(0.7^i * n) of n patches
            are left behind the i-th layer.
        eps: how soft the plan is.
        iterations: of Sinkhorn's algorithm.

    Source: Haurum et al., "Which Tokens to Use?", ICCV Workshops 2023.
    """

    eps: float = number(1.0, "give a positive number such as 1", above=0)
    iterations: int = number(3, "give a number of iterations", least=1, whole=True)

    name = "sinkhorn"
    source = "Haurum et al., ICCV-W 2023"

    def module(self, dim: int, step: Step) -> nn.Module:
        return SinkhornCentres(dim, step.known.count, self.eps, self.iterations)
