"""Rows that stay and take in shares of the rows that go."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import take_rows
from .keep import KeepMap


class PropagateMap(KeepMap):
    """Keeps some tokens and adds weighted sums of others to them; sizes and other side data go the same way.

    What a dropped token gives to several others is no share of it: sizes do not add up to what they were, as published
    (Xu et al., WACV 2024).

    Args:
        idx: old index of every kept token [B, N'] in the new order.
        n_in: N.
        source: old index of the tokens that give [B, P].
        weight: what every kept token takes of them [B, N', P].
        valid: [B, N'] bool, False marks padding: such rows become zero.
    """

    whole = False
    copies = False

    def __init__(self, idx: Tensor, n_in: int, source: Tensor, weight: Tensor, valid: Tensor | None = None) -> None:
        super().__init__(idx, n_in, valid)
        self.source, self.weight = source, weight

    def shares(self, dtype: torch.dtype) -> None:
        return None

    def masked(self, visible: Tensor) -> PropagateMap:
        both = visible.gather(1, self.idx).unsqueeze(2) & visible.gather(1, self.source).unsqueeze(1)
        return PropagateMap(self.idx, self.n_in, self.source, self.weight * both, self.valid)

    def arranged(self, rows: Tensor) -> PropagateMap:
        kept = super().arranged(rows)
        return PropagateMap(kept.idx, self.n_in, self.source, take_rows(self.weight, rows), kept.valid)

    def apply(self, x: Tensor) -> Tensor:
        kept = torch.baddbmm(take_rows(x, self.idx), self.weight.to(x.dtype), take_rows(x, self.source))
        return kept if self.valid is None else kept * self.valid.unsqueeze(-1).to(kept.dtype)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor:
        size = torch.ones(batch, self.n_in, 1, device=device) if size is None else size
        return self.pool(size)

    def matrix(self) -> Tensor:
        kept = self.membership().double()
        given = torch.nn.functional.one_hot(self.source, self.n_in).to(kept.dtype)
        given = self.weight.double() @ given
        return kept + (given if self.valid is None else given * self.valid.unsqueeze(2))
