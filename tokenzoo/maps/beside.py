"""Groups, and some tokens once more as they are beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenMap
from .keep import KeepMap


class BesideMap(TokenMap):
    """The new tokens of another map, and behind them some old tokens as they are.

    A token that stands beside its group counts in both rows: the group still averages it, and the way back gives it its
    own row. Others read what the map makes of them.

    Args:
        merge: the map to the groups; tokens that stand beside them may be in none.
        rows: old index of every token that stands beside [B, P].
        valid: [B, P] bool, False for padding; None without.
    """

    def __init__(self, merge: TokenMap, rows: Tensor, valid: Tensor | None = None) -> None:
        self.merge, self.beside = merge, KeepMap(rows, merge.n_in, valid)
        self.n_in, self.n_out, self.linear = merge.n_in, merge.n_out + rows.shape[1], merge.linear
        if merge.valid is not None or valid is not None:
            real = (_all(merge.heads) if merge.valid is None else merge.valid, _all(rows) if valid is None else valid)
            self.valid = torch.cat(real, dim=1)

    @property
    def heads(self) -> Tensor:
        return torch.cat([self.merge.heads, self.beside.heads], dim=1)

    @property
    def complete(self) -> bool:
        """Whether every old token is known to have a new one, which spares a look at them."""
        return self.beside.valid is None and self.merge.complete

    @property
    def assign(self) -> Tensor:
        if self.beside.valid is None:
            slots = torch.arange(self.merge.n_out, self.n_out, device=self.beside.idx.device)
            return self.merge.assign.scatter(1, self.beside.idx, slots.expand_as(self.beside.idx))
        own = self.beside.assign
        return torch.where(own >= 0, own + self.merge.n_out, self.merge.assign)

    def masked(self, visible: Tensor) -> BesideMap:
        return BesideMap(self.merge.masked(visible), self.beside.idx, self.beside.valid)

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([self.merge.apply(x), self.beside.apply(x)], dim=1)

    def pool(self, mass: Tensor) -> Tensor:
        return torch.cat([self.merge.pool(mass), self.beside.pool(mass)], dim=1)

    def lift_to_members(self, y: Tensor) -> Tensor:
        groups, single = y[:, : self.merge.n_out], y[:, self.merge.n_out :]
        return self.merge.lift_to_members(groups) + self.beside.lift_to_members(single)

    def membership(self) -> Tensor:
        return torch.cat([self.merge.membership(), self.beside.membership()], dim=1)

    def matrix(self) -> Tensor:
        return torch.cat([self.merge.matrix().double(), self.beside.matrix().double()], dim=1)


def _all(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool)
