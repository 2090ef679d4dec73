"""Low-pass filtering of a sequence of samples, its resampling to fewer, and the way back, each as one matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ENTRIES = 1 << 18  # of the matrix that are worked out at once

def low_pass(few: Tensor, many: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix that takes `many` samples to `few` without their high frequencies [B, rows, columns] float32.

    An orthonormal discrete cosine transform (DCT-II) of `many` samples, the lowest `few` frequencies of it, the inverse
    transform at that length, times sqrt(few / many), so that constants stay as they are. Rows and columns beyond the
    counts of an image are zero. The way back, which fills the missing frequencies with zeros, is the transpose times
    many / few.

    Args:
        few: samples after it [B, 1, 1] int64, at least 1.
        many: samples before it [B, 1, 1] int64, at least `few`.
        rows: rows of the matrix.
        columns: columns of the matrix.
    """
    if rows * columns > _ENTRIES and rows > 1:  # integers take several times the memory of the matrix
        slots = torch.arange(rows, device=few.device).split(max(1, _ENTRIES // columns))
        return torch.cat([_low_pass(few, many, part, columns) for part in slots], dim=1)
    return _low_pass(few, many, torch.arange(rows, device=few.device), columns)


def _low_pass(few: Tensor, many: Tensor, slots: Tensor, columns: int) -> Tensor:
    """Some rows of it."""
    i = slots.view(1, -1, 1)
    j = torch.arange(columns, device=few.device).view(1, 1, -1)
    a, b = (2 * i + 1) * many, (2 * j + 1) * few  # angles of sample i and j in units of pi / (2 * few * many)
    total = _dirichlet(a + b, few, many) + _dirichlet(a - b, few, many)
    return torch.where((i < few) & (j < many), total / many, torch.zeros_like(total))


def _dirichlet(p: Tensor, few: Tensor, many: Tensor) -> Tensor:
    """1 / 2 and the sum of cos(k * p * unit) for k = 1 .. few - 1, in closed form, the unit as above.

    It is sin((few - 1 / 2) * angle) / (2 * sin(angle / 2)). Angles are reduced as integers: in float32, products of
    long sequences would have no correct digit behind the point left.
    """
    half = 4 * few * many  # half a turn of angle / 2, in units of pi / (4 * few * many)
    same = p.remainder(half) == 0  # the angle is a whole turn: all cosines are 1
    upper, lower = _sine((2 * few - 1) * p, half), 2 * _sine(p, half)
    return torch.where(same, few - 0.5, upper / torch.where(same, torch.ones_like(lower), lower))


def _sine(p: Tensor, half: Tensor) -> Tensor:
    """sin(pi * p / half) of integers, exact to rounding near its zeros too."""
    turns = (2 * p + half).div(2 * half, rounding_mode="floor")
    rest = torch.sin((p - turns * half) * (math.pi / half))
    return torch.where(turns.remainder(2) == 0, rest, -rest)


def overlaps(few: Tensor, many: Tensor, rows: int, columns: int) -> Tensor:
    """Share of every one of `many` stretches of a line in every one of `few` [B, rows, columns] float32.

    Args:
        few: stretches after it [B, 1, 1] int64.
        many: stretches before it [B, 1, 1] int64.
        rows: rows of the matrix.
        columns: columns of the matrix.
    """
    if rows * columns > _ENTRIES and rows > 1:
        slots = torch.arange(rows, device=few.device).split(max(1, _ENTRIES // columns))
        return torch.cat([_overlaps(few, many, part, columns) for part in slots], dim=1)
    return _overlaps(few, many, torch.arange(rows, device=few.device), columns)


def _overlaps(few: Tensor, many: Tensor, slots: Tensor, columns: int) -> Tensor:
    """Some rows of it."""
    i = slots.view(1, -1, 1)
    j = torch.arange(columns, device=few.device).view(1, 1, -1)
    first, last = torch.maximum(i * many, j * few), torch.minimum((i + 1) * many, (j + 1) * few)
    share = (last - first).clamp(min=0).float() / few
    return torch.where((i < few) & (j < many), share, torch.zeros_like(share))
