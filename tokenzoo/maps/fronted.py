"""A map in a sequence with more tokens in front, which it leaves as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import TokenMap


class FrontedMap(TokenMap):
    """Another map, behind tokens in front that stay: what it would have been, had these stood there.

    Args:
        inner: the map of the tokens behind them.
        count: tokens in front.
    """

    def __init__(self, inner: TokenMap, count: int) -> None:
        self.inner, self.count = inner, count
        self.n_in, self.n_out = inner.n_in + count, inner.n_out + count
        self.whole, self.linear, self.drops = inner.whole, inner.linear, inner.drops
        self.opens_span, self.copies, self.undo = inner.opens_span, inner.copies, inner.undo
        self.grid_out, self.sees_itself = inner.grid_out, inner.sees_itself
        self.valid = None if inner.valid is None else F.pad(inner.valid, (count, 0), value=True)
        self.gate = None if inner.gate is None else F.pad(inner.gate, (count, 0), value=1.0)

    def _behind(self, index: Tensor) -> Tensor:
        """Indices of the tokens behind those in front, with these before them."""
        own = torch.arange(self.count, device=index.device).expand(index.shape[0], -1)
        return torch.cat([own, torch.where(index < 0, index, index + self.count)], dim=1)

    @property
    def heads(self) -> Tensor:
        return self._behind(self.inner.heads)

    @property
    def assign(self) -> Tensor:
        return self._behind(self.inner.assign)

    @property
    def dropped(self) -> Tensor:
        return F.pad(self.inner.dropped, (self.count, 0), value=False)

    @property
    def num_dropped(self) -> int | None:
        return self.inner.num_dropped

    def apply(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.count], self.inner.apply(x[:, self.count :])], dim=1)

    def pool(self, mass: Tensor) -> Tensor:
        return torch.cat([mass[:, : self.count], self.inner.pool(mass[:, self.count :])], dim=1)

    def means(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.count], self.inner.means(x[:, self.count :])], dim=1)

    def shares(self, dtype: torch.dtype) -> Tensor | None:
        shares = self.inner.shares(dtype)
        return None if shares is None else F.pad(shares, (self.count, 0), value=1.0)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        inner = self.inner.mass(None if size is None else size[:, self.count :], batch, device)
        if inner is None:
            return None
        front = inner.new_ones(batch, self.count, 1) if size is None else size[:, : self.count]
        return torch.cat([front, inner], dim=1)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        stash = None if dropped is None else dropped[:, self.count :]
        return torch.cat([y[:, : self.count], self.inner.lift(y[:, self.count :], stash)], dim=1)

    def lift_to_members(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, : self.count], self.inner.lift_to_members(y[:, self.count :])], dim=1)

    def with_lift(self, **options: Any) -> FrontedMap:
        return FrontedMap(self.inner.with_lift(**options), self.count)

    def masked(self, visible: Tensor) -> FrontedMap:
        return FrontedMap(self.inner.masked(visible[:, self.count :]), self.count)

    def membership(self) -> Tensor:
        return self._bordered(self.inner.membership())

    def matrix(self) -> Tensor:
        return self._bordered(self.inner.matrix())

    def _bordered(self, inner: Tensor) -> Tensor:
        matrix = F.pad(inner, (self.count, 0, self.count, 0))
        matrix[:, : self.count, : self.count] = torch.eye(self.count, dtype=inner.dtype, device=inner.device)
        return matrix
