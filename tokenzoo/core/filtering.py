"""Low-pass filters along the grid of the patches where it is complete, else along their sequence in raster order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import Filter, LowPassMap
from ..ops.cells.regular import regular_cells
from ..ops.low_pass import low_pass, overlaps
from ..ops.rows import stable_order
from .selection import own_counts, raster_order
from .tokens import Tokens


class _Counts(NamedTuple):
    """Patches of every image [B, 1], or of all images [1, 1].

    Attributes:
        many: patches that are filtered: real ones that no mask hides.
        few: tokens that these become.
        kept: tokens that are left, hidden ones included.
    """

    many: Tensor
    few: Tensor
    kept: Tensor


def filtered(
    tokens: Tokens, cells: tuple[int, int] | None, remaining: Callable[[int], int], rescale: bool = True
) -> LowPassMap:
    """The map from all patches to fewer, without their high frequencies.

    Images that have all their patches are filtered along both axes of the grid where cells are given, whatever their
    batch mates have lost; the patches of all others along their sequence. Patches that a mask hides are no part of it:
    some stay as they are where visible ones do not fill the tokens that are left, and the others go.

    Args:
        tokens: the tokens, in any order.
        cells: tokens (down, right) that a full grid is left with; None filters along the sequence.
        remaining: tokens that are left of a number of patches.
        rescale: constants stay as they are; False leaves the scale of orthonormal transforms.
    """
    layout, patches, device = tokens.layout, tokens.num_patches, tokens.x.device
    rows, alike = remaining(patches), tokens.valid is None and tokens.visible is None
    counts, order = _counts(tokens, remaining), _order(tokens)
    whole = cells is not None and patches == layout.num_patches
    filters, heads, assign = [], *_stretches(counts, rows, patches)
    if whole:
        axes = [(_number(few, device), _number(many, device)) for few, many in zip(cells, layout.grid)]
        filters = [_filter(*axis, few, many, rescale) for axis, few, many in zip(axes, cells, layout.grid)]
        middles, homes = regular_cells(layout.grid, cells, device)
        full = counts.many == patches
        heads, assign = torch.where(full, middles, heads), torch.where(full, homes, assign)
    if not (whole and alike):
        own = _filter(counts.few, counts.many, rows, patches, rescale)
        own = own if tokens.visible is None else _beside(own, counts)
        if whole:
            own = _where(full.unsqueeze(2), Filter.joined(filters), own)
        filters = [own]
    heads, assign = (part.expand(tokens.x.shape[0], -1) for part in (heads, assign))
    if order is not None:
        heads, assign = order.gather(1, heads), assign.gather(1, stable_order(order))
    valid = None
    if tokens.valid is not None:
        real = torch.arange(rows, device=device) < counts.kept
        valid = torch.cat([real.new_ones(real.shape[0], layout.num_prefix), real], dim=1)
    return LowPassMap(filters, layout.num_prefix, *_behind_prefix(heads, assign, tokens), order, valid)


def _order(tokens: Tokens) -> Tensor | None:
    """Patches in raster order [B, M], hidden ones behind visible ones and padding last; None while they stand so."""
    order = raster_order(tokens)
    if tokens.visible is None:
        return order
    hidden = (~tokens.visible[:, tokens.layout.num_prefix :]).long()
    if tokens.valid is not None:
        hidden = hidden + (~tokens.valid[:, tokens.layout.num_prefix :]).long()
    if order is None:
        return stable_order(hidden)
    return order.gather(1, stable_order(hidden.gather(1, order)))


def _counts(tokens: Tokens, remaining: Callable[[int], int]) -> _Counts:
    patches, device, own = tokens.num_patches, tokens.x.device, own_counts(remaining, tokens)
    many, kept = _number(patches, device), _number(remaining(patches), device)
    if own is not None:
        many, kept = tokens.valid_patches.unsqueeze(1), own
    if tokens.visible is not None:
        many = tokens.visible[:, tokens.layout.num_prefix :].sum(1, keepdim=True)
    return _Counts(many, torch.minimum(many, kept), kept)


def _stretches(counts: _Counts, rows: int, patches: int) -> tuple[Tensor, Tensor]:
    """Head of every token [B, rows], and token of every patch [B, M], -1 for none, both by rank.

    They are stretches as even as can be; patches behind those that are filtered stand for themselves, while there is
    room.
    """
    many, few, kept = counts
    rank, slot = (torch.arange(size, device=many.device).unsqueeze(0) for size in (patches, rows))
    alone = rank - many + few
    assign = torch.where(rank < many, rank * few // many.clamp(min=1), torch.where(alone < kept, alone, -1))
    first, last = -(-slot * many // few.clamp(min=1)), -(-(slot + 1) * many // few.clamp(min=1)) - 1
    middle = (first + last).div(2, rounding_mode="floor")
    # rows of padding are headed by patches of padding: many - few + kept patches are real or gone in front of these
    return torch.where(slot < few, middle, slot - few + many).clamp(max=patches - 1), assign


def _filter(few: Tensor, many: Tensor, rows: int, columns: int, rescale: bool) -> Filter:
    """One axis.

    Args:
        few: samples after it [B or 1, 1].
        many: samples before it.
        rows: the most samples after it.
        columns: the most samples before it.
        rescale: constants stay as they are.
    """
    few, many = few.clamp(min=1).unsqueeze(2), many.clamp(min=1).unsqueeze(2)
    down, ratio = low_pass(few, many, rows, columns), many / few
    if not rescale:
        down, ratio = down * ratio.sqrt(), torch.ones_like(ratio)
    return Filter(down, ratio.expand(-1, rows, -1), partial(overlaps, few, many, rows, columns))


def _where(condition: Tensor, first: Filter, second: Filter) -> Filter:
    """For every image one of two filters [B, 1, 1] bool."""
    down, back = (torch.where(condition, a, b) for a, b in zip(first[:2], second[:2]))
    return Filter(down, back, lambda: torch.where(condition, first.shares(), second.shares()))


def _beside(axis: Filter, counts: _Counts) -> Filter:
    """The same with the patches behind those that are filtered as they are."""
    many, few, kept = (count.unsqueeze(2) for count in counts)
    rows, columns = axis.down.shape[1:]
    slot = torch.arange(rows, device=many.device).view(1, -1, 1)
    patch = torch.arange(columns, device=many.device).view(1, 1, -1)
    filtered = slot < few
    alone = (~filtered & (slot < kept) & (patch - many == slot - few)).to(axis.down.dtype)
    as_they_are = Filter(alone, torch.ones_like(axis.back), lambda: alone)
    return _where(filtered, axis, as_they_are)


def _number(value: int, device: torch.device) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.int64, device=device)


def _behind_prefix(heads: Tensor, assign: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Heads and assignment of the patches with the prefix in front."""
    prefix = tokens.layout.num_prefix
    front = torch.arange(prefix, device=heads.device).expand(tokens.x.shape[0], -1)
    slots = torch.where(assign >= 0, assign + prefix, -1)
    return torch.cat([front, heads + prefix], dim=1), torch.cat([front, slots], dim=1)
