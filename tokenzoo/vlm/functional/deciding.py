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
LONG = 4096  # rows of which all cosines are held at most: 64 MiB
_SLICE = 256  # rows that are compared with all others at once


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


class Cosines:
    """Cosines between rows of the same image, a row of them at a time.

    One product of all rows runs several times as fast as many small ones, so that it is made once; of long sequences it
    would not fit, and rows are compared when they are asked for.

    Args:
        x: [B, N, C].
    """

    def __init__(self, x: Tensor) -> None:
        self.units = unit(x)
        short = x.shape[1] <= LONG
        self._all = torch.bmm(self.units, self.units.transpose(1, 2)) if short else None

    def row(self, index: Tensor) -> Tensor:
        """Cosine of every row with one of its image: index [B] -> [B, N]."""
        if self._all is not None:
            return row_of(self._all, index)
        return torch.bmm(self.units, row_of(self.units, index).unsqueeze(-1)).squeeze(-1)

    def nearest(self) -> Tensor:
        """Largest cosine of every row with another one [B, N]."""
        n, found = self.units.shape[1], []
        for rows in torch.arange(n, device=self.units.device).split(_SLICE):
            if self._all is not None:
                alike = self._all[:, rows]
            else:
                alike = torch.bmm(self.units[:, rows], self.units.transpose(1, 2))
            found.append(alike.scatter(2, rows.view(1, -1, 1).expand(len(alike), -1, 1), float("-inf")).amax(-1))
        return torch.cat(found, dim=1)
