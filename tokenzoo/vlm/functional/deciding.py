"""What all decisions share: no gradient, float32, and equal scores in the order in which rows stand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.attention import full_precision

T = TypeVar("T")


def deciding(function: Callable[..., T]) -> Callable[..., T]:
    """Runs a function without gradients and in full precision; its first argument is a tensor."""

    @functools.wraps(function)
    def decide(first: Tensor, *args: object, **options: object) -> T:
        with torch.no_grad(), full_precision(first):
            return function(first, *args, **options)

    return decide


def ranked(score: Tensor) -> Tensor:
    """Rows from the highest score down, of equal ones the first in front: [B, N] -> [B, N] int64."""
    return score.sort(dim=1, descending=True, stable=True).indices


def top(score: Tensor, keep: int) -> Tensor:
    """The rows with the highest scores in the order in which they stand: [B, N] -> [B, keep] int64."""
    return ranked(score)[:, :keep].sort(dim=1).values


def unit(x: Tensor) -> Tensor:
    """Rows of length 1 in float32, [..., C]; zeros stay zeros."""
    return F.normalize(x.float(), dim=-1)


def row_of(x: Tensor, index: Tensor) -> Tensor:
    """One row of each image: x [B, N, C], index [B] -> [B, C]."""
    return x[torch.arange(x.shape[0], device=x.device), index]


def cosines(units: Tensor, index: Tensor) -> Tensor:
    """Cosine of every row with one of its image: units [B, N, C], index [B] -> [B, N]."""
    return torch.bmm(units, row_of(units, index).unsqueeze(-1)).squeeze(-1)
