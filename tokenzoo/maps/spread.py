"""Patches shared out among some of them: every new token is a mix of all, every old one counts in several."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenMap


class SpreadMap(TokenMap):
    """Prefix tokens stay as they are, and each patch is shared out among the new tokens.

    The way back gives every patch the mix of new tokens that it went into, by its shares.

    Args:
        heads: old index of the token that stands for each new one [B, N'], prefix tokens in front.
        shares: share of every old patch that each new one holds [B, K, M]; columns sum to one, or to zero where an old
            patch counts nowhere.
        num_prefix: prefix tokens in front.
        weight: weight of every old patch in the means [B, 1, M]; None weighs all alike.
        rows: weights of the means [B, K, M] where they are not the shares by weight; rows sum to one.
        valid: [B, N'] bool, False for padding; None without.
    """

    def __init__(
        self,
        heads: Tensor,
        shares: Tensor,
        num_prefix: int,
        weight: Tensor | None = None,
        rows: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        self._heads, self.shares_of, self.num_prefix, self.weight, self.rows = heads, shares, num_prefix, weight, rows
        self.n_out, self.n_in, self.valid = heads.shape[1], num_prefix + shares.shape[2], valid

    @property
    def heads(self) -> Tensor:
        return self._heads

    @property
    def assign(self) -> Tensor:
        patches = self.shares_of.argmax(dim=1) + self.num_prefix
        patches = torch.where(self.shares_of.sum(1) > 0, patches, -1)
        return torch.cat([self._prefix(patches), patches], dim=1)

    def masked(self, visible: Tensor) -> SpreadMap:
        return self  # whoever shares patches out knows the mask already: shares of one depend on all others

    def _prefix(self, like: Tensor) -> Tensor:
        return torch.arange(self.num_prefix, device=like.device).expand(like.shape[0], -1)

    def means_by(self, dtype: torch.dtype) -> Tensor:
        """Weights of old patches in the new ones [B, K, M]."""
        if self.rows is not None:
            return self.rows.to(dtype)
        weighed = self.shares_of if self.weight is None else self.shares_of * self.weight
        weighed = weighed.to(torch.promote_types(weighed.dtype, dtype))
        total = weighed.sum(2, keepdim=True)
        return (weighed / total.clamp(min=torch.finfo(total.dtype).tiny)).to(dtype)

    def _with_prefix(self, x: Tensor, patches: Tensor) -> Tensor:
        return torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix else patches

    def apply(self, x: Tensor) -> Tensor:
        return self._with_prefix(x, torch.bmm(self.means_by(x.dtype), x[:, self.num_prefix :]))

    def pool(self, mass: Tensor) -> Tensor:
        return self._with_prefix(mass, torch.bmm(self.shares_of.to(mass.dtype), mass[:, self.num_prefix :]))

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        back = torch.bmm(self.shares_of.transpose(1, 2).to(y.dtype), y[:, self.num_prefix :])
        if dropped is not None:
            nowhere = self.shares_of.sum(1) <= 0
            back = torch.where(nowhere.unsqueeze(-1), dropped[:, self.num_prefix :].to(y.dtype), back)
        return self._with_prefix(y, back)

    def membership(self) -> Tensor:
        return self._dense(self.shares_of)

    def matrix(self) -> Tensor:
        return self._dense(self.means_by(torch.float64))

    def _dense(self, weights: Tensor) -> Tensor:
        out = weights.new_zeros(weights.shape[0], self.n_out, self.n_in)
        out[:, self.num_prefix :, self.num_prefix :] = weights
        index = torch.arange(self.num_prefix, device=weights.device)
        out[:, index, index] = 1
        return out
