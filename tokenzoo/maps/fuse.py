"""Rows that stay, and one row more for what is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import take_rows
from .base import TokenMap
from .keep import KeepMap


class FuseMap(TokenMap):
    """Keeps some tokens and adds one more: the weighted sum of the tokens that are left out (EViT's fused token).

    Args:
        idx: old index of every kept token [B, K] in the new order.
        weight: raw weight of every old token in the fused one [B, N], zero for kept tokens; not normalised.
        left_out: [B, N] bool, the tokens that the fused one stands for.
        valid: [B, K + 1] bool or None.
    """

    whole = True
    drops = True

    def __init__(self, idx: Tensor, weight: Tensor, left_out: Tensor, valid: Tensor | None = None) -> None:
        self.idx, self.weight, self.left_out, self.valid = idx, weight, left_out, valid
        self.n_in, self.n_out = weight.shape[1], idx.shape[1] + 1

    @property
    def heads(self) -> Tensor:
        return torch.cat([self.idx, torch.full_like(self.idx[:, :1], -1)], dim=1)

    @property
    def assign(self) -> Tensor:
        kept = None if self.valid is None else self.valid[:, :-1]
        return torch.where(self.left_out, self.n_out - 1, KeepMap(self.idx, self.n_in, kept).assign)

    @property
    def dropped(self) -> Tensor:
        return self.left_out

    @property
    def num_dropped(self) -> int | None:
        return self.n_in - self.n_out + 1 if self.valid is None else None

    def shares(self, dtype: torch.dtype) -> Tensor:
        return torch.where(self.left_out, self.weight.to(dtype), 1.0)

    def masked(self, visible: Tensor) -> FuseMap:
        return FuseMap(self.idx, self.weight * visible, self.left_out, self.valid)

    def _with_row(self, x: Tensor, weight: Tensor) -> Tensor:
        kept = take_rows(x, self.idx)
        if self.valid is not None:
            kept = kept * self.valid[:, :-1].unsqueeze(-1).to(kept.dtype)
        fused = torch.bmm(weight.to(x.dtype).unsqueeze(1), x)
        return torch.cat([kept, fused], dim=1)

    def apply(self, x: Tensor) -> Tensor:
        return self._with_row(x, self.weight)

    def pool(self, mass: Tensor) -> Tensor:
        return self._with_row(mass, self.left_out)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        # a token that was left out reappears as it was when given, else it reads the fused token it went into
        back = super().lift(y)
        if dropped is None:
            return back
        return torch.where(self.left_out.unsqueeze(-1), dropped.to(back.dtype), back)

    def matrix(self) -> Tensor:
        kept = KeepMap(self.idx, self.n_in, None if self.valid is None else self.valid[:, :-1]).matrix()
        return torch.cat([kept.double(), self.weight.unsqueeze(1).double()], dim=1)
