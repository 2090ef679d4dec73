"""Rows that stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import scatter_values, take_rows
from .base import TokenMap


class KeepMap(TokenMap):
    """Keeps some tokens as they are (top-k, sampling, every k-th).

    Args:
        idx: old index of every kept token [B, N'] in the new order.
        n_in: N.
        valid: [B, N'] bool, False marks padding: such rows become zero.
    """

    whole = True
    drops = True
    copies = True

    def __init__(self, idx: Tensor, n_in: int, valid: Tensor | None = None) -> None:
        self.idx, self.n_in, self.n_out, self.valid = idx, n_in, idx.shape[1], valid

    @property
    def heads(self) -> Tensor:
        return self.idx

    @property
    def num_dropped(self) -> int | None:
        return self.n_in - self.n_out if self.valid is None else None

    @property
    def assign(self) -> Tensor:
        slots = torch.arange(self.n_out, device=self.idx.device).expand_as(self.idx)
        if self.valid is None:
            return scatter_values(self.n_in, self.idx, slots, -1)
        # padding rows repeat some index: they are written to a column that is cut off again
        idx = torch.where(self.valid, self.idx, self.n_in)
        return scatter_values(self.n_in + 1, idx, slots, -1)[:, : self.n_in]

    def shares(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(self.idx.shape[0], self.n_in, device=self.idx.device, dtype=dtype)

    def masked(self, visible: Tensor) -> KeepMap:
        return self

    def arranged(self, rows: Tensor) -> KeepMap:
        valid = None if self.valid is None else self.valid.gather(1, rows)
        return KeepMap(self.idx.gather(1, rows), self.n_in, valid)

    def apply(self, x: Tensor) -> Tensor:
        kept = take_rows(x, self.idx)
        return kept if self.valid is None else kept * self.valid.unsqueeze(-1).to(kept.dtype)

    def pool(self, mass: Tensor) -> Tensor:
        return self.apply(mass)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        # keeping rows leaves ones at one: stay None, so that attention needs no bias
        return None if size is None else self.pool(size)

    def matrix(self) -> Tensor:
        return self.membership()
