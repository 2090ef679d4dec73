"""Every patch a mixture of means over its neighbourhood; all tokens stay in their places."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .base import TokenMap


class PooledMap(TokenMap):
    """Tokens with other values around a branch: sizes, places and the way back are those of the tokens themselves.

    Args:
        x: the tokens [B, N, C].
        pool_values: what stands in their places, a linear map along the tokens, [B, N, D] -> [B, N, D].
    """

    whole = True
    in_place = True
    visible: Tensor | None = None  # tokens that a mask does not hide [B, N]; hidden ones are zeros to their neighbours

    def __init__(self, x: Tensor, pool_values: Callable[[Tensor], Tensor]) -> None:
        self.batch, self.device, self.pool_values = x.shape[0], x.device, pool_values
        self.n_in = self.n_out = x.shape[1]

    @property
    def heads(self) -> Tensor:
        return torch.arange(self.n_in, device=self.device).expand(self.batch, -1)

    @property
    def assign(self) -> Tensor:
        return self.heads

    def apply(self, x: Tensor) -> Tensor:
        if self.visible is None:
            return self.pool_values(x)
        hidden = ~self.visible.unsqueeze(-1)
        return torch.where(hidden, x, self.pool_values(x.masked_fill(hidden, 0.0)))

    def masked(self, visible: Tensor) -> PooledMap:
        other = copy.copy(self)
        other.visible = visible
        return other

    def pool(self, mass: Tensor) -> Tensor:
        return mass

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        return y

    def lift_to_members(self, y: Tensor) -> Tensor:
        return self.matrix().transpose(1, 2).to(y.dtype) @ y

    def matrix(self) -> Tensor:
        return self.apply(torch.eye(self.n_in, device=self.device).expand(self.batch, -1, -1))
