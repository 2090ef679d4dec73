"""Options of methods that keep a share or a count of the patches at a few blocks, or the best of them by score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from ..maps import KeepMap
from .method import Method
from .options import number
from .schedule import Keep, KeepMass, kept_of, kept_patches, open_counts
from .selection import keep_best, keep_mass
from .step import Step
from .tokens import Tokens
from .traits import Traits


@dataclass(frozen=True, kw_only=True)
class KeepRate(Method):
    """Base of methods with a keep rate or explicit counts at chosen blocks; options: see `describing`."""

    keep_rate: float | tuple[float, ...] = 0.7
    tokens: int | tuple[int | None, ...] | None = None

    schedule = Keep()


def _open(method: Any) -> bool:
    return method.mass is not None and open_counts(method.tokens)


# of methods that inherit `KeepBest`, on top of what they declare themselves
MASS = {"pads": lambda m: m.mass is not None, "data_dependent": _open, "static": "tokens=128"}


@dataclass(frozen=True, kw_only=True)
class KeepBest(KeepRate):
    """Base of methods that keep the patches with the highest attention, by rate, by count or by mass."""

    mass: float | None = number(None, "give the share of the attention mass to keep, such as 0.9", above=0, most=1,
                                none=True)  # fmt: skip

    schedule = KeepMass()
    traits = Traits(reads_maps=True, **MASS)

    @final
    def best(self, scores: Tensor, tokens: Tokens, step: Step) -> KeepMap | None:
        """What is kept by these scores [B, N], None where that is everything."""
        if self.mass is not None:
            return keep_mass(scores, tokens, self.mass, step.strength[1])
        if kept_patches(tokens.length, step, tokens.layout) == tokens.num_patches:
            return None  # so it is for images that have fewer
        return keep_best(scores, tokens, kept_of(step, tokens.layout))
