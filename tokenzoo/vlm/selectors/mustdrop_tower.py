"""mustdrop_tower: alike windows become one row, and the best rows stay (the first stage of MustDrop)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.options import number, pair, sides
from ..base import Selector
from ..functional import merge_windows, top, window_likeness
from ..registry import register_selector
from ..rows import NewRows, VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class MustDropTower(Selector):
    """Merges windows of alike neighbours into their means, then keeps the rows that the class token attends to most.

    The first stage of MustDrop: its windows act behind the tower here (inside the tower, `algm` merges them), and the
    rows that its key set protects in later stages are those that stay. Attention is that of the tower's last layer,
    means over windows; the mean that a row gets where there is no class token. Images with so many alike windows that
    fewer than `keep` rows are left keep those. Without a grid no windows merge.

    Args:
        threshold: least mean cosine of a window that merges; above 1 none does.
        window: rows per window, (down, right) or one number for both; rest lines and columns belong to none.

    Source: Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024.
    """

    threshold: float = number(0.8, "give a cosine such as 0.8")
    window: int | tuple[int, int] = pair(3, "use 2 or more", area=2)

    name = "mustdrop_tower"
    source = "Liu et al., 2024"
    kind = "merge"
    reads = ("tower", "features")
    in_tower_space = True
    data_dependent = True

    def layers(self, depth: int) -> tuple[int, ...]:
        return (-1,)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> NewRows:
        score, window = signals.importance(-1), sides(self.window)
        grid = rows.grid if rows.grid and all(a >= b for a, b in zip(rows.grid, window)) else None
        likeness = None if grid is None else window_likeness(rows.features, grid, window)
        found = []
        for b, x in enumerate(rows.values):
            assign = torch.arange(len(x), device=x.device)
            if likeness is not None:
                assign = merge_windows(likeness[b], grid, window, int((likeness[b] >= self.threshold).sum()))
            found.append(_best(x, score[b], assign, keep))
        length = max(len(slots) for _, slots, _ in found)
        new, slots, assign = zip(*found)
        # images with fewer rows repeat one of theirs, which changes nothing
        at = [torch.arange(length, device=score.device).clamp(max=len(s) - 1) for s in slots]
        return NewRows(
            torch.stack([x[i] for x, i in zip(new, at)]), torch.stack([s[i] for s, i in zip(slots, at)]),
            torch.stack(assign), rows.inside,
        )  # fmt: skip

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * (dim * math.prod(sides(self.window)) + heads)


def _best(x: Tensor, score: Tensor, assign: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the best groups of one image, the member of each with the highest score, and where every row went."""
    belongs = assign == torch.arange(int(assign.max()) + 1, device=x.device)[:, None]  # [groups, N]
    count = belongs.sum(1, keepdim=True)
    kept = top((belongs * score).sum(1)[None] / count.T, keep)[0]
    slots = torch.where(belongs[kept], score, -torch.inf).argmax(1)
    place = torch.full((len(belongs),), -1, device=x.device)
    place[kept] = torch.arange(len(kept), device=x.device)
    share = (belongs[kept] / count[kept]).to(x.dtype)
    return share @ x, slots, place[assign]
