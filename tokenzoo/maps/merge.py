"""Weighted means over groups, by touching only the rows that receive something."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import add_rows, max_rows, scatter_values, stable_order, take_rows
from .base import TokenMap


class MergeMap(TokenMap):
    """Merges source tokens into the tokens that stay, as weighted means.

    Only the rows that receive something are touched, so tokens that stand for themselves are exact copies.

    Args:
        order: old index of the token that heads each new one [B, N'].
        src: old indices of the tokens that are merged away [B, S].
        slot: new index each source goes to [B, S], -1 to drop it.
        n_in: N.
        weight: weight of every old token in the means [B, N, 1]; None weighs all alike.
        reduce: "mean", "sum" or "max".
        valid: [B, N'] bool or None.
    """

    whole = True

    def __init__(
        self,
        order: Tensor,
        src: Tensor,
        slot: Tensor,
        n_in: int,
        weight: Tensor | None = None,
        reduce: str = "mean",
        valid: Tensor | None = None,
    ) -> None:
        self.order, self.src, self.slot, self.n_in, self.weight = order, src, slot, n_in, weight
        self.n_out, self.reduce, self.valid = order.shape[1], reduce, valid
        self.linear = reduce != "max"

    @classmethod
    def from_assign(
        cls, order: Tensor, assign: Tensor, weight: Tensor | None = None, valid: Tensor | None = None
    ) -> MergeMap:
        """A map given by the new index of every token [B, N] (-1 drops it) and the head of every new one [B, N']."""
        n_in, n_out = assign.shape[1], order.shape[1]
        is_head = scatter_values(n_in, order, torch.ones_like(order), 0)
        # heads come last, so the first N - N' entries are the sources
        src = stable_order(is_head)[:, : n_in - n_out]
        return cls(order, src, assign.gather(1, src), n_in, weight, "mean", valid)

    @property
    def heads(self) -> Tensor:
        return self.order

    @property
    def assign(self) -> Tensor:
        slots = torch.arange(self.n_out, device=self.order.device).expand_as(self.order)
        return scatter_values(self.n_in, self.order, slots, -1).scatter(1, self.src, self.slot)

    def _received(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Slots to add to, and the source rows, zero where a source is dropped."""
        slot = self.slot.clamp(min=0)
        return slot, take_rows(values, self.src) * (self.slot >= 0).unsqueeze(-1).to(values.dtype)

    def apply(self, x: Tensor) -> Tensor:
        out = take_rows(x, self.order)
        if self.src.shape[1] == 0:
            return out
        if self.reduce == "sum":
            return add_rows(out, *self._received(x))
        if self.reduce == "max":
            return max_rows(out, self.slot, take_rows(x, self.src))
        weight = self.weight
        if weight is None:
            weight = torch.ones(x.shape[0], self.n_in, 1, device=x.device)
        # shares in float32 at least, and in float64 for values that are
        share = self._shares(weight.to(torch.promote_types(weight.dtype, x.dtype))).to(x.dtype)
        slot = self.slot.clamp(min=0)
        # weighted mean = head + sum of share * (source - head): rows without sources stay exact
        delta = share * (take_rows(x, self.src) - take_rows(out, slot))
        return add_rows(out, slot, delta)

    def _shares(self, weight: Tensor) -> Tensor:
        """Share of each source in the mean of its group [B, S, 1]."""
        total = take_rows(self.pool(weight), self.slot.clamp(min=0))
        given = self._received(weight)[1]
        return torch.where(total > 0, given / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(given))

    def pool(self, mass: Tensor) -> Tensor:
        return add_rows(take_rows(mass, self.order), *self._received(mass))

    def matrix(self) -> Tensor:
        member = self.membership().double()
        if self.reduce == "sum":
            return member
        if self.reduce == "max":
            raise TypeError("MergeMap(reduce='max') is not linear: it has no matrix; use reduce='mean' or 'sum'")
        weight = member if self.weight is None else member * self.weight.transpose(1, 2)
        total = weight.sum(-1, keepdim=True)
        head = torch.nn.functional.one_hot(self.order, self.n_in).to(weight.dtype)
        return torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), head)
