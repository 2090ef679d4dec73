"""Weighted means over groups, by touching only the rows that receive something."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..ops.matching.bipartite import Pairs
from ..ops.rows import add_rows, flat_rows, max_rows, scatter_values, stable_order, take_rows
from .base import TokenMap


class MergeMap(TokenMap):
    """Merges source tokens into the tokens that stay, as weighted means.

    Only the rows that receive something are touched, so tokens that stand for themselves are exact copies.

    Args:
        order: old index of the token that heads each new one [B, N'].
        src: old indices of the tokens that are merged away [B, S].
        slot: new index each source goes to [B, S], -1 to drop it.
        n_in: N.
        weight: weight of every old token in the means [B, N, 1]; None weighs all alike. Sums and maxima know no
            weights.
        reduce: "mean", "sum" or "max".
        valid: [B, N'] bool or None.
        counted: [B, N, 1] bool, False for sources that a sum or a maximum leaves out (a mask hides them); None where
            all take part.
        drops: whether a slot of -1 may be that of a real token.
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
        counted: Tensor | None = None,
        drops: bool = False,
    ) -> None:
        self.order, self.src, self.slot, self.n_in, self.weight = order, src, slot, n_in, weight
        self.n_out, self.reduce, self.valid = order.shape[1], reduce, valid
        self.counted, self.drops = counted, drops
        self.linear = reduce != "max"
        self._flat: dict[str, Tensor] = {}  # rows of the flattened token axis, made once for all that is merged
        self._total: tuple[Tensor, Tensor] | None = None  # weights that were summed already, and their sums
        self._share: Tensor | None = None  # share of each source in the mean of its group
        self._assign: Tensor | None = None

    @classmethod
    def from_assign(
        cls,
        order: Tensor,
        assign: Tensor,
        weight: Tensor | None = None,
        valid: Tensor | None = None,
        reduce: str = "mean",
        counted: Tensor | None = None,
        drops: bool = False,
    ) -> MergeMap:
        """A map given by the new index of every token [B, N] (-1 drops it) and the head of every new one [B, N']."""
        n_in, n_out = assign.shape[1], order.shape[1]
        is_head = scatter_values(n_in, order, torch.ones_like(order), 0)
        # heads come last, so the first N - N' entries are the sources
        src = stable_order(is_head)[:, : n_in - n_out]
        return cls(order, src, assign.gather(1, src), n_in, weight, reduce, valid, counted, drops)

    @classmethod
    def of_pairs(
        cls, pairs: Pairs, n_in: int, weight: Tensor | None = None, reduce: str = "mean", complete: bool = True
    ) -> MergeMap:
        """The map of a matching, in which every source has a slot unless there is padding, or it is not `complete`."""
        found = cls(pairs.order, pairs.src, pairs.slot, n_in, weight, reduce, pairs.valid)
        found.complete = complete and pairs.valid is None
        return found

    @property
    def heads(self) -> Tensor:
        return self.order

    @property
    def assign(self) -> Tensor:
        if self._assign is None:
            slots = torch.arange(self.n_out, device=self.order.device).expand_as(self.order)
            self._assign = scatter_values(self.n_in, self.order, slots, -1).scatter(1, self.src, self.slot)
        return self._assign

    @property
    def num_dropped(self) -> int | None:
        return self.n_in - self.n_out if self.valid is None else None

    def masked(self, visible: Tensor) -> MergeMap:
        if self.src.shape[1] == 0:
            return self
        assign = self.assign
        if self.reduce == "mean":
            order, weight = visible_groups(assign, self.order, self.weight, visible)
            return MergeMap.from_assign(order, assign, weight, self.valid, drops=self.drops)
        order, seen = visible_groups(assign, self.order, None, visible)
        counted = seen > 0 if self.counted is None else (seen > 0) & self.counted
        return MergeMap.from_assign(order, assign, self.weight, self.valid, self.reduce, counted, self.drops)

    def arranged(self, rows: Tensor) -> MergeMap:
        places = torch.arange(self.n_out, device=rows.device).expand_as(rows)
        new = scatter_values(self.n_out, rows, places, 0)  # where each new token goes
        found = copy.copy(self)  # all else of it, and of forms built on it, speaks of old tokens
        found._flat, found._total, found._share, found._assign = {}, None, None, None
        found.order = self.order.gather(1, rows)
        found.valid = None if self.valid is None else self.valid.gather(1, rows)
        found.slot = torch.where(self.slot >= 0, new.gather(1, self.slot.clamp(min=0)), -1)
        return found

    def _rows(self, name: str) -> Tensor:
        """Old rows of `order` or `src`, or new ones of `slot`, of the flattened token axis."""
        if name not in self._flat:
            index = getattr(self, name)
            if name == "slot" and not self.complete:
                index = index.clamp(min=0)
            self._flat[name] = flat_rows(index, self.n_out if name == "slot" else self.n_in)
        return self._flat[name]

    def _heads_of(self, values: Tensor) -> Tensor:
        """Rows of the tokens that head the new ones, in memory of their own."""
        return take_rows(values, self.order, self._rows("order"))

    def _sources_of(self, values: Tensor) -> Tensor:
        return take_rows(values, self.src, self._rows("src"))

    def _received(self, values: Tensor) -> Tensor:
        """The source rows, zero where a source is dropped."""
        given = self._sources_of(values)
        return given if self.complete else given * (self.slot >= 0).unsqueeze(-1).to(values.dtype)

    def _at_slots(self, values: Tensor) -> Tensor:
        """Rows of new tokens that the sources go to; of those that are dropped, any."""
        return take_rows(values, self.slot if self.complete else self.slot.clamp(min=0), self._rows("slot"))

    def _added(self, heads: Tensor, given: Tensor) -> Tensor:
        """Head rows, which are written to, with those of their sources added."""
        slot = self.slot if self.complete else self.slot.clamp(min=0)
        return add_rows(heads, slot, given, self._rows("slot"), own=True)

    def apply(self, x: Tensor) -> Tensor:
        out = self._heads_of(x)
        if self.src.shape[1] == 0:
            return out
        if self.reduce == "sum":
            given = self._received(x)
            return self._added(out, given if self.counted is None else given * self._counts.to(x.dtype))
        if self.reduce == "max":
            given = self._sources_of(x)
            if self.valid is not None or self.counted is not None:  # some sources may have no slot, or be hidden
                given = given.masked_fill(~self._counts, float("-inf"))
            return max_rows(out, self.slot.clamp(min=0), given)
        share = self._shares(x).to(x.dtype)
        # weighted mean = head + sum of share * (source - head): rows without sources stay exact
        delta = share * (self._sources_of(x) - self._at_slots(out))
        return self._added(out, delta)

    @property
    def _counts(self) -> Tensor:
        """Sources that take part in a sum or a maximum [B, S, 1] bool."""
        counts = (self.slot >= 0).unsqueeze(-1)
        return counts if self.counted is None else counts & self._sources_of(self.counted)

    def _shares(self, x: Tensor) -> Tensor:
        """Share of each source in the mean of its group [B, S, 1]; none in a group without any weight.

        In float32 at least, and in float64 for values that are.
        """
        weight, dtype = self.weight, torch.promote_types(torch.float32, x.dtype)
        dtype = dtype if weight is None else torch.promote_types(weight.dtype, dtype)
        if self._share is not None and self._share.dtype == dtype:
            return self._share
        if weight is None:
            weight = torch.ones(x.shape[0], self.n_in, 1, device=x.device, dtype=dtype)
        known = self._total is not None and self._total[0] is weight and weight.dtype == dtype
        weight = weight.to(dtype)
        total = self._at_slots(self._total[1] if known else self.pool(weight))
        self._share = self._received(weight) / total.clamp(min=torch.finfo(total.dtype).tiny)
        return self._share

    def shares(self, dtype: torch.dtype) -> Tensor | None:
        return group_shares(self, self.weight, dtype) if self.reduce == "mean" else None

    def pool(self, mass: Tensor) -> Tensor:
        return self._added(self._heads_of(mass), self._received(mass))

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if size is None:
            return super().mass(size, batch, device)
        total = self.pool(size)
        self._total = size, total
        return total

    def matrix(self) -> Tensor:
        member = self.membership().double()
        if self.reduce == "sum":
            counts = torch.ones_like(self.assign, dtype=torch.bool)
            counts = counts if self.counted is None else counts.scatter(1, self.src, self._counts.squeeze(-1))
            return member * counts.unsqueeze(1)
        if self.reduce == "max":
            raise TypeError("MergeMap(reduce='max') is not linear: it has no matrix; use reduce='mean' or 'sum'")
        weight = member if self.weight is None else member * self.weight.transpose(1, 2)
        total = weight.sum(-1, keepdim=True)
        head = torch.nn.functional.one_hot(self.order, self.n_in).to(weight.dtype)
        return torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), head)


def group_shares(token_map: TokenMap, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Share of every old token in the weighted mean of its group [B, N].

    Args:
        token_map: says which tokens belong together.
        weight: weight of every old token [B, N, 1]; None weighs all alike.
        dtype: of the shares.
    """
    assign = token_map.assign
    weight = torch.ones_like(assign, dtype=dtype) if weight is None else weight.squeeze(-1).to(dtype)
    total = token_map.pool(weight.unsqueeze(-1)).squeeze(-1).gather(1, assign.clamp(min=0))
    # a group without any weight keeps the value of its head
    head = token_map.heads.gather(1, assign.clamp(min=0)) == torch.arange(token_map.n_in, device=assign.device)
    return torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), head.to(dtype))


def visible_groups(assign: Tensor, heads: Tensor, weight: Tensor | None, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Heads [B, N'] and weights [B, N, 1] of groups in which hidden tokens count for nothing beside visible ones.

    A hidden head of a group with visible members gives its place to the first of these, so that the group has its
    position and its entries in a mask.

    Args:
        assign: new index of every old token [B, N], -1 for none.
        heads: old index of the token that heads each new one [B, N'], -1 for none.
        weight: weight of every old token in the means [B, N, 1]; None weighs all alike.
        visible: [B, N] bool.
    """
    n_in, n_out = assign.shape[1], heads.shape[1]
    index = torch.arange(n_in, device=assign.device).expand_as(assign)
    slot = torch.where(visible & (assign >= 0), assign, n_out)
    first = torch.full_like(heads[:, :1], n_in).expand(-1, n_out + 1)
    first = first.scatter_reduce(1, slot, index, reduce="amin")[:, :n_out]
    seen = first < n_in
    heads = torch.where(seen & ~visible.gather(1, heads.clamp(min=0)), first, heads)
    counts = (visible | ~seen.gather(1, assign.clamp(min=0))).unsqueeze(-1)
    return heads, counts.float() if weight is None else weight * counts
