"""Windows of neighbours at a first block, pairs of the whole image at later ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..options import sides
from ..step import Step
from ..tokens import Layout
from .base import Schedule
from .per_layer import spread


class Stage(NamedTuple):
    """What happens in one block.

    Attributes:
        local: windows of neighbours merge; else pairs of the whole image.
        count: windows or pairs to merge, None for as many as the image asks for.
    """

    local: bool
    count: int | None


@dataclass(frozen=True)
class Stages(Schedule):
    """Fixed numbers of windows and pairs to merge, or None for what the images ask for: options `r` and `window`."""

    def parse(self, method: Any) -> dict[str, Any]:
        r = tuple(method.r) if isinstance(method.r, (tuple, list)) else method.r
        for count in r if isinstance(r, tuple) else (r,):
            if count is not None and (type(count) is not int or count < 0):
                raise ValueError(f"{method.name}: r={r!r}; give counts of windows and pairs to merge, or None")
        return {"r": r}

    def strengths(self, method: Any, layers: Sequence[int]) -> dict[int, Stage]:
        counts = spread(method.r, tuple(sorted(layers)), f"{method.name}: r")
        return {i: Stage(i == min(counts), count) for i, count in counts.items() if count != 0}

    def windows(self, method: Any, patches: int, layout: Layout) -> int:
        """Windows, or stretches where the patches do not form the grid, that can merge."""
        down, right = sides(method.window)
        if patches == layout.num_patches:
            return (layout.grid[0] // down) * (layout.grid[1] // right)
        # n - 1 fewer than there are tokens for: no image with less of them can then be left with more
        return max(0, (patches - down * right + 2) // (down * right))

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        local, count = step.strength
        if count is None:
            return n
        patches = n - layout.num_prefix
        most = self.windows(step.method, patches, layout) if local else patches // 2
        if count > most:
            what = "windows" if local else "pairs"
            raise step.error(f"r={count} cannot be reached, at most {most} {what} of {n} tokens can merge; lower r")
        return n - count * (math.prod(sides(step.method.window)) - 1 if local else 1)

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        left, counts = layout.num_patches, []
        for index in range(len(layers)):
            most = left // 2 if index else self.windows(method, left, layout)
            counts.append(round(t * most))
            left -= counts[-1] * (1 if index else math.prod(sides(method.window)) - 1)
        return {"r": tuple(counts)}

    def image_dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        return {"r": None, "threshold": 1 - 2 * t}  # the range of a cosine
