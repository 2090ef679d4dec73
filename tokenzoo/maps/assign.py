"""Weighted means over groups, images with different numbers of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import add_rows, scatter_values, take_rows
from .base import TokenMap
from .merge import MergeMap, group_shares, visible_groups


class AssignMap(TokenMap):
    """Merges tokens into groups as weighted means, where images may end up with different numbers of tokens.

    Every token is touched; where all images keep the same number, `MergeMap` says the same in less work. A token that
    is alone in its group stays an exact copy.

    Args:
        assign: new index of every old token [B, N], -1 for padding.
        heads: old index of the token that heads each new one [B, N'], -1 for padding rows.
        weight: weight of every old token in the means [B, N, 1]; None weighs all alike.
        valid: [B, N'] bool, False marks padding: such rows become zero.
    """

    whole = True

    def __init__(self, assign: Tensor, heads: Tensor, weight: Tensor | None, valid: Tensor) -> None:
        self._assign, self._heads, self.weight, self.valid = assign, heads, weight, valid
        self.n_in, self.n_out = assign.shape[1], heads.shape[1]

    @property
    def heads(self) -> Tensor:
        return self._heads

    @property
    def assign(self) -> Tensor:
        return self._assign

    def apply(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight is None:
            weight = torch.ones(x.shape[0], self.n_in, 1, device=x.device)
        weight = weight.to(torch.promote_types(weight.dtype, x.dtype))
        total = take_rows(self.pool(weight), self._assign.clamp(min=0))
        share = weight / total.clamp(min=torch.finfo(total.dtype).tiny)
        return self.pool(share.to(x.dtype) * x)

    def pool(self, mass: Tensor) -> Tensor:
        mass = mass * (self._assign >= 0).unsqueeze(-1).to(mass.dtype)
        zeros = mass.new_zeros(mass.shape[0], self.n_out, mass.shape[2])
        return add_rows(zeros, self._assign.clamp(min=0), mass)

    def shares(self, dtype: torch.dtype) -> Tensor:
        return group_shares(self, self.weight, dtype)

    def masked(self, visible: Tensor) -> AssignMap:
        heads, weight = visible_groups(self._assign, self._heads, self.weight, visible)
        return AssignMap(self._assign, heads, weight, self.valid)

    def matrix(self) -> Tensor:
        member = self.membership().double()
        weight = member if self.weight is None else member * self.weight.transpose(1, 2)
        return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def group_map(
    assign: Tensor, is_head: Tensor, n_out: int, weight: Tensor | None, valid: Tensor | None
) -> MergeMap | AssignMap:
    """The map of a grouping in its cheapest form.

    Args:
        assign: new index of every old token [B, N], -1 for padding.
        is_head: [B, N] bool, one token of every group.
        n_out: N', groups of every image, or of the one with the most.
        weight: weight of every old token in the means [B, N, 1], or None.
        valid: [B, N'] bool where images differ in their number of groups or hold padding, else None.
    """
    index = torch.arange(assign.shape[1], device=assign.device).expand_as(assign)
    heads = scatter_values(n_out + 1, torch.where(is_head, assign, n_out), index, -1)[:, :n_out]
    if valid is None:
        return MergeMap.from_assign(heads, assign, weight)
    return AssignMap(assign, heads, weight, valid)
