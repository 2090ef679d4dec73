"""Rows of images on their way into a language model: what selectors see and give back, and how rows that go are marked.

A row that goes keeps its place until the language model begins, and is marked: all of its channels are minus infinity.
Encoded images are handed on, repeated for beams and cut into chunks as opaque rows, so the mark needs no side channel,
and there are as many rows as placeholders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import TokenMap
from ..ops.rows import scatter_values, take_rows

MARK = float("-inf")


class VisualRows(NamedTuple):
    """Rows of images, crops or frames of equal size.

    Attributes:
        x: rows as the language model would see them [B, N, D].
        grid: rows (high, wide) where they form a grid, N = high * wide; else None.
        tower: what the tower gives for the same rows, in front of the projector [B, N, C], the mean where a row is made
            of several patches; for selectors that read "features" or mix `in_tower_space`, else None.
        class_token: what the tower gives for the class token [B, 1, C]; for selectors that take it, None without one.
        part: crop, tile or frame that each row comes from [B, N] int64, 0 for the thumbnail; all 0 where a selector is
            asked for each alone.
        place: (row, column) of each row in its part [B, N, 2] float32; None where unknown.
        inside: whether new values may be made of `tower`, for the projector still to see.
    """

    x: Tensor
    grid: tuple[int, int] | None = None
    tower: Tensor | None = None
    class_token: Tensor | None = None
    part: Tensor | None = None
    place: Tensor | None = None
    inside: bool = False

    @property
    def length(self) -> int:
        """N."""
        return self.x.shape[1]

    @property
    def features(self) -> Tensor:
        """What the tower gives where it is known, else what the language model would see [B, N, C or D]."""
        return self.x if self.tower is None else self.tower

    @property
    def values(self) -> Tensor:
        """What new rows are made of [B, N, C or D]: in front of the projector where `inside`."""
        return self.tower if self.inside else self.x


class NewRows(NamedTuple):
    """Rows that a selector has made itself, for decisions that are no map.

    Attributes:
        x: values as the language model sees them [B, K, D], or as the tower gives them where `in_tower_space`.
        slots: which old row lends each its place [B, K] int64, no row twice.
        assign: new row of every old one [B, N], -1 for dropped ones; for pictures. None: only the slots stand for
            themselves.
        in_tower_space: whether the projector still has to see them.
    """

    x: Tensor
    slots: Tensor
    assign: Tensor | None = None
    in_tower_space: bool = False


def mark(x: Tensor, keep: Tensor) -> Tensor:
    """Rows with those that go marked: x [..., N, D], keep [..., N] bool."""
    return torch.where(keep.unsqueeze(-1), x, MARK)


def marked(x: Tensor) -> Tensor:
    """Which rows are marked: x [..., N, D] -> [..., N] bool."""
    return x.detach().amax(-1) == MARK  # in one pass


def slots_of(token_map: TokenMap) -> Tensor:
    """Old row that lends each new one its place [B, K]; no place is taken twice.

    A new row without a head takes the place of the dropped row that weighs most in it; where nothing does, that of the
    first dropped row that is free.
    """
    heads, n = token_map.heads, token_map.n_in
    if bool((heads >= 0).all()) and _distinct(heads, n):
        return heads
    weight = token_map.matrix().abs().float()  # [B, K, N]
    taken = torch.zeros(heads.shape[0], n, dtype=torch.bool, device=heads.device)
    slots = heads.clone()
    for b in range(heads.shape[0]):
        owner: dict[int, int] = {}
        for k, head in enumerate(heads[b].tolist()):
            if head >= 0 and head not in owner:
                owner[head], taken[b, head] = k, True
        for k, head in enumerate(heads[b].tolist()):
            if owner.get(head) != k:
                free = weight[b, k].masked_fill(taken[b], -1.0)
                slots[b, k] = free.argmax()
                taken[b, slots[b, k]] = True
    return slots


def _distinct(index: Tensor, n: int) -> bool:
    ones = torch.zeros(index.shape[0], n, dtype=torch.int64, device=index.device)
    return int(ones.scatter_add(1, index, torch.ones_like(index)).max()) <= 1


def placed(x: Tensor, slots: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """New rows [B, K, D] at their places among n, marks elsewhere; and which places are taken [B, n] bool."""
    at = scatter_values(n, slots, torch.arange(slots.shape[1], device=slots.device).expand_as(slots), -1)
    keep = at >= 0
    return mark(take_rows(x, at.clamp(min=0)), keep), keep
