"""Means of groups in which sources bring a part of their mass."""

from __future__ import annotations

import torch
from torch import Tensor

from .merge import MergeMap


class PartialMap(MergeMap):
    """Merges as `MergeMap`; of the size of a token that is merged away, a part alone goes to its new one.

    Args:
        order, src, slot, n_in, weight, valid, drops: as for `MergeMap`.
        part: part of the size of every old token that counts where it is merged away [B, N, 1].
    """

    whole = False

    def __init__(
        self,
        order: Tensor,
        src: Tensor,
        slot: Tensor,
        n_in: int,
        part: Tensor,
        weight: Tensor | None = None,
        valid: Tensor | None = None,
        drops: bool = False,
    ) -> None:
        super().__init__(order, src, slot, n_in, weight, "mean", valid, drops=drops)
        self.part = part

    def masked(self, visible: Tensor) -> PartialMap:
        plain = MergeMap(self.order, self.src, self.slot, self.n_in, self.weight, "mean", self.valid, drops=self.drops)
        seen = plain.masked(visible)
        return PartialMap(seen.order, seen.src, seen.slot, self.n_in, self.part, seen.weight, self.valid, self.drops)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if size is None:
            size = torch.ones(batch, self.n_in, 1, device=device)
        return self._added(self._heads_of(size), self._received(size * self.part))
