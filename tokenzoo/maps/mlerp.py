"""Means of groups that are as long as their longest member."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import max_rows, take_rows
from .merge import MergeMap, visible_groups


class MlerpMap(MergeMap):
    """Merges as `MergeMap`; a mean of several tokens is stretched to the norm of the longest one (MLERP).

    Norms are those of the values that the map is applied to, so it is no matrix. A mean without direction (opposite
    tokens) gives way to the token that heads the group.

    Args:
        order, src, slot, n_in, weight, valid, counted, drops: as for `MergeMap`.
        divisor: what the mean is divided by before: "mean", its own norm, or "head", that of the token that heads the
            group, which preserves no norm.
    """

    def __init__(
        self,
        order: Tensor,
        src: Tensor,
        slot: Tensor,
        n_in: int,
        weight: Tensor | None = None,
        divisor: str = "mean",
        valid: Tensor | None = None,
        counted: Tensor | None = None,
        drops: bool = False,
    ) -> None:
        super().__init__(order, src, slot, n_in, weight, "mean", valid, counted, drops)
        self.divisor, self.linear = divisor, False

    def masked(self, visible: Tensor) -> MlerpMap:
        if self.src.shape[1] == 0:
            return self
        assign = self.assign
        order, weight = visible_groups(assign, self.order, self.weight, visible)
        return MlerpMap.from_assign(order, assign, weight, self.valid, self.divisor, drops=self.drops)

    def apply(self, x: Tensor) -> Tensor:
        mean = super().apply(x)
        if self.src.shape[1] == 0:
            return mean
        lengths = _lengths(x)
        counts = (self.slot >= 0).unsqueeze(-1)
        if self.weight is not None:
            counts = counts & (take_rows(self.weight, self.src) > 0)
        slot, head = self.slot.clamp(min=0), take_rows(lengths, self.order)
        longest = max_rows(head, slot, take_rows(lengths, self.src) * counts)
        length = _lengths(mean) if self.divisor == "mean" else head
        stretched = mean * (longest / length.clamp(min=torch.finfo(length.dtype).tiny)).to(mean.dtype)
        stretched = torch.where(length > 0, stretched, take_rows(x, self.order))
        received = max_rows(torch.zeros_like(head), slot, counts.to(head.dtype)) > 0
        return torch.where(received, stretched, mean)  # tokens that are alone stay exact copies

    def shares(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def matrix(self) -> Tensor:
        raise TypeError("MlerpMap stretches means to the norms of the values: it has no matrix")


def _lengths(x: Tensor) -> Tensor:
    """Norms [B, N, 1], float32 at least."""
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, keepdim=True)
