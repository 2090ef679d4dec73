"""Patches filtered along the axes of their grid, or along their sequence: the same fixed weights for every image."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.attention import full_precision
from ..ops.rows import split_dim, stable_order, take_rows
from .base import TokenMap


class Filter(NamedTuple):
    """What happens along one axis, for every image [B, ...] or for all of them [1, ...].

    Attributes:
        down: from samples before to samples after [B, m, n].
        back: the way back is the transpose, behind this factor of every sample after [B, m, 1].
        shares: gives the share of every sample before in each one after [B, m, n]; columns sum to one. Made when
            somebody asks: it is as large as `down`.
    """

    down: Tensor
    back: Tensor
    shares: Callable[[], Tensor]

    @staticmethod
    def joined(filters: list[Filter]) -> Filter:
        """Filters along several axes as one along the sequence, the last axis running fastest."""
        joined = filters[0]
        for axis in filters[1:]:
            first = joined
            joined = Filter(
                _pairs(first.down, axis.down), _pairs(first.back, axis.back),
                lambda first=first, axis=axis: _pairs(first.shares(), axis.shares()),
            )  # fmt: skip
        return joined


class LowPassMap(TokenMap):
    """Prefix tokens stay as they are; patches lose their high frequencies, and fewer samples hold the rest.

    The way back interpolates: the patches without their high frequencies. Weights have signs, so sizes do not follow
    them: each new token stands for an equal part of every axis.

    Args:
        filters: along every axis, outermost first.
        num_prefix: prefix tokens in front.
        heads: old index of the token that stands for each new one [B, N'].
        assign: new index of every old token [B, N], -1 for padding.
        order: patch that comes to stand in each place of the axes [B, M]; None for patches in their places.
        valid: [B, N'] bool, False for padding; None without.
    """

    def __init__(
        self,
        filters: list[Filter],
        num_prefix: int,
        heads: Tensor,
        assign: Tensor,
        order: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        self.filters, self.num_prefix, self.order, self.valid = filters, num_prefix, order, valid
        self._heads, self._assign = heads, assign
        self.n_out, self.n_in = heads.shape[1], assign.shape[1]

    @property
    def heads(self) -> Tensor:
        return self._heads

    @property
    def assign(self) -> Tensor:
        return self._assign

    def masked(self, visible: Tensor) -> LowPassMap:
        return self  # whoever filters knows the mask already: every weight depends on how many patches there are

    def apply(self, x: Tensor) -> Tensor:
        return self._reduced(x, [axis.down for axis in self.filters])

    def pool(self, mass: Tensor) -> Tensor:
        return self._reduced(mass, [axis.shares() for axis in self.filters])

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        factors = reduce(_pairs, [axis.back for axis in self.filters]).to(y.dtype)
        back = _along([axis.down.transpose(1, 2) for axis in self.filters], y[:, self.num_prefix :] * factors)
        if self.order is not None:
            back = take_rows(back, stable_order(self.order))
        back = torch.cat([y[:, : self.num_prefix], back], dim=1)
        return back if dropped is None else torch.where((self.assign < 0).unsqueeze(-1), dropped.to(back.dtype), back)

    def membership(self) -> Tensor:
        return self._dense(Filter.joined(self.filters).shares())

    def matrix(self) -> Tensor:
        return self._dense(Filter.joined(self.filters).down)

    def _reduced(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        patches = x[:, self.num_prefix :]
        patches = _along(weights, patches if self.order is None else take_rows(patches, self.order))
        return torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix else patches

    def _dense(self, weights: Tensor) -> Tensor:
        weights = weights.double().expand(self._heads.shape[0], -1, -1)
        if self.order is not None:  # columns back to where the patches stand
            weights = weights.gather(2, stable_order(self.order).unsqueeze(1).expand_as(weights))
        out = weights.new_zeros(weights.shape[0], self.n_out, self.n_in)
        out[:, self.num_prefix :, self.num_prefix :] = weights
        index = torch.arange(self.num_prefix, device=weights.device)
        out[:, index, index] = 1
        return out


def _pairs(outer: Tensor, inner: Tensor) -> Tensor:
    """Kronecker products of matrices [B, i, j] and [B, k, l] -> [B, i * k, j * l]."""
    return torch.einsum("bij,bkl->bikjl", outer, inner).flatten(3).flatten(1, 2)


def _along(weights: list[Tensor], x: Tensor) -> Tensor:
    """Matrices [B or 1, m, n] applied along the axes that the rows of x [B, N, C] are made of; float32 inside."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with full_precision(x):
        y = x.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
        if len(weights) == 1:
            return (weights[0] @ y).to(x.dtype)
        high, wide = weights
        y = split_dim(high @ split_dim(y, 1, high.shape[2], wide.shape[2]).flatten(2), 2, wide.shape[2], x.shape[2])
        wide = wide.unsqueeze(1).expand(*y.shape[:2], -1, -1)  # so that counters of products see all of them
        return (wide @ y).flatten(1, 2).to(x.dtype)
