"""What all decisions share: no gradient, float32, and equal scores in the order in which rows stand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.attention import full_precision
from ...ops.rows import take_rows

T = TypeVar("T")
LONG = 4096  # rows of which all cosines are held at most: 64 MiB
_SLICE = 256  # rows that are compared with all others at once
_FEW = 5  # a row of cosines takes about so many times as long alone as in a product of all


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
    """One row of each image: x [B, N, C], index [B] or [B, 1] -> [B, C]."""
    return take_rows(x, index.view(-1, 1)).squeeze(1)


class Cosines:
    """Cosines between rows of the same image, a row of them at a time.

    One product of all rows runs several times as fast as one after the other, so that it is made where many of them are
    asked for; of long sequences it would not fit, and rows are compared when they are asked for.

    Args:
        x: [B, N, C].
        asked: how many rows will be asked for, at most; None for all.
    """

    def __init__(self, x: Tensor, asked: int | None = None) -> None:
        self.units, n = unit(x), x.shape[1]
        few = asked is not None and asked * _FEW < n
        self._all = None if few or n > LONG else likeness(self.units)

    def row(self, index: Tensor) -> Tensor:
        """Cosine of every row with one of its image: index [B] or [B, 1] -> [B, N]."""
        if self._all is not None:
            return row_of(self._all, index)
        return torch.bmm(self.units, row_of(self.units, index).unsqueeze(-1)).squeeze(-1)

    def nearest(self) -> Tensor:
        """Largest cosine of every row with another one [B, N]."""
        if self._all is not None:
            own = self._all.diagonal(dim1=1, dim2=2)
            kept = own.clone()
            own.fill_(float("-inf"))
            found = self._all.amax(-1)
            own.copy_(kept)
            return found
        n, parts = self.units.shape[1], []
        for rows in torch.arange(n, device=self.units.device).split(_SLICE):
            alike = torch.bmm(self.units[:, rows], self.units.transpose(1, 2))
            parts.append(alike.scatter(2, rows.view(1, -1, 1).expand(len(alike), -1, 1), float("-inf")).amax(-1))
        return torch.cat(parts, dim=1)


def likeness(units: Tensor) -> Tensor:
    """Products of all pairs of rows of the same image: [B, N, C] -> [B, N, N].

    On a CPU the half below the diagonal is copied, which takes about two thirds of the time; elsewhere one product
    is as fast as a few.
    """
    n = units.shape[1]
    if units.device.type != "cpu" or n < _SLICE or torch.compiler.is_compiling():
        return torch.bmm(units, units.transpose(1, 2))
    found, step = units.new_empty(len(units), n, n), -(-n // 6)
    for start in range(0, n, step):
        stop = min(start + step, n)
        found[:, start:stop, start:] = torch.bmm(units[:, start:stop], units[:, start:].transpose(1, 2))
        found[:, stop:, start:stop] = found[:, start:stop, stop:].transpose(1, 2)
    return found
