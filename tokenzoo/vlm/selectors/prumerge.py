"""prumerge: outliers of the class token's attention, which take in their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Selector
from ..functional import prumerge_rows, prumerge_weights
from ..registry import register_selector
from ..rows import NewRows, VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class PruMerge(Selector):
    """Keeps rows that the class token attends to unusually much, adds their neighbours, and one row of all that go.

    Attention is that of the tower's last layer with all heads as one wide head (the mean that a row gets where there is
    no class token). A new row is itself plus its 32 nearest others by keys, weighted by their attention. Without a
    budget each image keeps as many as are outliers; with one, keep - 1 rows and the one of those that go.

    Args:
        plus: PruMerge+, which keeps rows at even distances too: three times as many.

    Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025.
    """

    plus: bool = False

    name = "prumerge"
    source = "Shang et al., ICCV 2025"
    kind = "merge"
    reads = ("tower",)
    in_tower_space = True
    data_dependent = True

    def count(self, n: int) -> int:
        return max(1, n - 1) if self.keep is None and self.keep_total is None else super().count(n)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (-1,)

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> NewRows:
        adaptive = self.keep is None and self.keep_total is None
        score, keys, n = signals.joined_row(-1), signals.keys(-1), rows.length
        kept = [prumerge_rows(s, None if adaptive else max(1, keep - 1), self.plus) for s in score]
        found = [self._new(*image, n if adaptive else keep) for image in zip(rows.values, score, keys, kept)]
        length = max(len(slots) for _, slots, _ in found)
        new, slots, assign = zip(*found)
        # images with fewer rows repeat one of theirs, which changes nothing
        at = [torch.arange(length, device=score.device).clamp(max=len(s) - 1) for s in slots]
        return NewRows(
            torch.stack([x[i] for x, i in zip(new, at)]), torch.stack([s[i] for s, i in zip(slots, at)]),
            torch.stack(assign), rows.inside,
        )  # fmt: skip

    def _new(self, x: Tensor, score: Tensor, keys: Tensor, kept: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """New rows of one image, their places, and the new row of every old one."""
        weights = prumerge_weights(score, keys, kept)
        assign = torch.full((len(x),), -1, device=x.device)
        assign[kept] = torch.arange(len(kept), device=x.device)
        gone = (assign < 0).nonzero().flatten()
        if len(gone) == 0 or len(kept) == most:  # no row goes, or a budget of one row, which is the best one's
            return weights[:-1].to(x.dtype) @ x, kept, assign
        last = gone[score[gone].argmax()]  # the row of those that go takes the place of the one that weighs most in it
        assign[gone] = len(kept)
        return weights.to(x.dtype) @ x, torch.cat([kept, last[None]]), assign

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * heads + n * keep * (heads + dim)
