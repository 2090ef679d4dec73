"""radial: keep the patches around the middle of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.keep_rate import KeepRate
from ..core.method import Step
from ..core.options import choice
from ..core.registry import register
from ..core.schedule import Keep, kept_of
from ..core.selection import keep_patches
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Traits
from ..maps import TokenMap

_NORMS: dict[str, Callable[[float, float], float]] = {
    "l1": lambda y, x: abs(y) + abs(x),
    "l2": lambda y, x: (y * y + x * x) ** 0.5,
    "linf": lambda y, x: max(abs(y), abs(x)),
}


def _axis(length: int) -> list[float]:
    """Places along an axis, from -ceil(length / 2) to floor(length / 2): off the middle by half a patch where odd."""
    low, high = -length // 2, length // 2
    return [low + i * (high - low) / (length - 1) for i in range(length)] if length > 1 else [0.0]


def radii(grid: tuple[int, int], pattern: str) -> tuple[float, ...]:
    """Distance of every patch from the middle, in raster order, rounded so that equal ones are equal."""
    norm = _NORMS[pattern]
    return tuple(round(norm(y, x), 6) for y in _axis(grid[0]) for x in _axis(grid[1]))


def ball(grid: tuple[int, int], pattern: str, target: int) -> int:
    """Patches of the ball that holds about `target`: the nearest count there is, the smaller ball where two are."""
    found = sorted(radii(grid, pattern))
    counts = [i for i in range(1, len(found) + 1) if i == len(found) or found[i] > found[i - 1]]
    return min(counts, key=lambda count: abs(count - target))


class _Balls(Keep):
    """Counts that a ball around the middle can have; the patches that are there where these are fewer."""

    def count(self, n: int, step: Step, layout: Layout) -> int:
        target, patches = super().count(n, step, layout), n - layout.num_prefix
        return target if target > patches else min(patches, ball(tuple(layout.grid), step.method.pattern, target))


@register
@dataclass(frozen=True, kw_only=True)
class Radial(KeepRate):
    """Keeps the patches in a ball around the middle of the image, the same ones for all: a baseline.

    A count comes to that of the nearest ball: 137 of 14 x 14 patches are 140 under l2. The published baseline hides
    patches from attention; here they leave. Its middle lies half a patch off where a side is odd, as published.

    Args:
        pattern: norm of the ball: "l1" (a diamond), "l2" (a disc) or "linf" (a square).

    Source: the fixed patterns of Haurum et al., "Which Tokens to Use?", ICCV Workshops 2023.
    """

    pattern: str = choice("l2", tuple(_NORMS))

    name = "radial"
    source = "Haurum et al., ICCV-W 2023"
    kind = "prune"
    schedule = _Balls()
    traits = Traits(place=BEFORE, positions=True)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout = tokens.layout
        found = radii(tuple(layout.grid), self.pattern)
        order = sorted(range(len(found)), key=found.__getitem__)
        # one number per patch, tokens without a place last
        ranks = dict(zip(order, range(len(order))))
        table = torch.tensor([-ranks[i] for i in range(len(found))] + [-len(found)], device=tokens.x.device)
        place = tokens.original_positions()[:, layout.num_prefix :] - layout.num_prefix
        scores = table.float()[torch.where(place < 0, len(found), place)]
        return keep_patches(scores, tokens, kept_of(step, layout))
