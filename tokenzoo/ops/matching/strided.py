"""Matching into destinations that lie evenly over the image: one token of every cell of the grid (tomesd).

Bolya, Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import known_rows, take_rows
from .bipartite import Pairs, best_partner, partner_rank, ranked_first, split_ranked, with_rank, without_hidden


def cell_split(
    grid: tuple[int, int], stride: tuple[int, int], device: torch.device, draw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Patches that may merge [S] and their destinations [D], both in raster order: one destination a whole cell.

    Patches in a remainder at the right or at the bottom, where no whole cell fits, are sources only.

    Args:
        grid: patches (high, wide).
        stride: size of a cell (down, right).
        device: where to make the indices.
        draw: number in [0, 1) for every whole cell that picks its destination [D]; None takes the top left.
    """
    patches, count = grid[0] * grid[1], (grid[0] // stride[0]) * (grid[1] // stride[1])
    rows = known_rows(lambda: _top_left(tuple(grid), tuple(stride)), device) if draw is None else None
    if rows is not None:
        return rows[: patches - count], rows[patches - count :]
    dst = cell_destinations(grid, stride, device, draw)
    taken = torch.zeros(patches, dtype=torch.int64, device=device).scatter(0, dst, 1)
    # destinations last: the first entries are the sources
    order = (taken * patches + torch.arange(patches, device=device)).argsort()
    return order[: patches - count], order[patches - count :]


@lru_cache(maxsize=64)
def _top_left(grid: tuple[int, int], stride: tuple[int, int]) -> tuple[int, ...]:
    """Patches that are not the top left one of a whole cell, and those that are, both in raster order."""
    (high, wide), (down, right) = grid, stride
    rows, columns = range(0, high - down + 1, down), range(0, wide - right + 1, right)
    dst = [row * wide + column for row in rows for column in columns]
    taken = set(dst)
    return (*(patch for patch in range(high * wide) if patch not in taken), *dst)


def cell_destinations(
    grid: tuple[int, int], stride: tuple[int, int], device: torch.device, draw: Tensor | None = None
) -> Tensor:
    """One patch of every whole cell, cells in raster order [D]; of several draws [..., D] one set each."""
    (high, wide), (down, right) = grid, stride
    rows, columns = high // down, wide // right
    corner = (
        torch.arange(rows, device=device).unsqueeze(1) * (down * wide) + torch.arange(columns, device=device) * right
    )
    dst = corner.flatten()
    if draw is not None:
        place = (draw * (down * right)).long()
        dst = dst + place.div(right, rounding_mode="floor") * wide + place % right
    return dst


def stretch_split(patches: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for patches in a row: the first of every `length` is a destination, also of a shorter last stretch."""
    index = torch.arange(patches, device=device)
    stretches = -(-patches // length)
    order = (index % length == 0).long().mul(patches).add(index).argsort()
    return order[: patches - stretches], order[patches - stretches :]


def best_destination(
    metric: Tensor,
    src: Tensor,
    dst: Tensor,
    valid: Tensor | None = None,
    visible: Tensor | None = None,
    receives: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The most similar destination of every source.

    Args:
        metric: what similarity is measured on [B, N, D].
        src: tokens that may merge [B, S].
        dst: tokens that may receive [B, D].
        valid: [B, N] bool, False for padding: such sources score -inf, such destinations lose to every real one.
        visible: [B, N] bool: hidden sources score inf, hidden destinations lose to every visible one.
        receives: [B, N] bool, where `src` and `dst` overlap since images have different numbers of destinations: which
            tokens these are. Others count as padding in `dst`, these as padding in `src`.

    Returns:
        Cosine [B, S] and place in `dst` [B, S].
    """
    metric = F.normalize(metric.float(), dim=-1)
    a, b = take_rows(metric, src), take_rows(metric, dst)
    if valid is None and visible is None:
        return best_partner(a, b)
    may_receive = valid if receives is None else valid & receives
    value, partner = best_partner(*with_rank(a, b, partner_rank(may_receive, visible).gather(1, dst)))
    if visible is not None:
        value, partner = without_hidden(value, partner, dst.shape[1])
    return ranked_first(value, valid if receives is None else valid & ~receives, visible, src), partner


def split_pairs(
    metric: Tensor, src: Tensor, dst: Tensor, r: int, num_prefix: int = 0, visible: Tensor | None = None
) -> Pairs:
    """The r sources most similar to some destination merge into it.

    The new order is [prefix, sources that stay by falling similarity, destinations].

    Args:
        metric: what similarity is measured on [B, N, D], prefix included.
        src: tokens that may merge [B or 1, S].
        dst: tokens that may receive [B or 1, D].
        r: sources to merge, at most S.
        num_prefix: tokens at the front that are in neither set.
        visible: [B, N] bool, see `best_destination`: hidden sources merge first; None without a mask.
    """
    batch = metric.shape[0]
    src, dst = src.expand(batch, -1), dst.expand(batch, -1)
    with torch.no_grad():
        value, partner = best_destination(metric, src, dst, visible=visible)
        gone, rest, _ = split_ranked(value, r, None, None)
    prefix = torch.arange(num_prefix, device=src.device).expand(batch, -1)
    order = torch.cat([prefix, src.gather(1, rest), dst], dim=1)
    return Pairs(order, src.gather(1, gone), partner.gather(1, gone) + num_prefix + rest.shape[1])
