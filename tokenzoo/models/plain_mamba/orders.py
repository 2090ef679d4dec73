"""The four continuous paths of PlainMamba over a grid of tokens, and what is left of them after pruning.

Path 0 snakes along rows from the top-left corner, first to the right; path 2 along columns, first downwards; paths 1
and 3 are paths 0 and 2 walked backwards.

Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

PATHS = 4
DIRECTIONS = 5  # how a path arrives at a token: 0 at its start, 1 right, 2 left, 3 up, 4 down

_LIMIT = 64  # grids kept, so that training at many sizes does not collect them for ever
_cache: OrderedDict[tuple[int, int, torch.device], ScanPaths] = OrderedDict()
_lock = threading.Lock()


class ScanPaths(NamedTuple):
    """The four paths over a whole grid of L tokens, all int64 [4, L].

    Attributes:
        order: raster position visited at each step.
        inverse: step at which each raster position is visited.
        direction: how each step arrives, one of the five codes.
    """

    order: Tensor
    inverse: Tensor
    direction: Tensor


class KeptPaths(NamedTuple):
    """The original paths over the K tokens that are left of a grid, all int64 [B, 4, K].

    Attributes:
        order: index among the kept tokens (ascending raster order) visited at each step.
        inverse: step at which each kept token is visited.
        direction: how the original path arrives at the token of each step.
        step: step on the original path that each step was, strictly ascending.
    """

    order: Tensor
    inverse: Tensor
    direction: Tensor
    step: Tensor


def build_paths(grid: tuple[int, int], device: torch.device | str | None = None) -> ScanPaths:
    """Computes the four paths over a grid, without the cache.

    Args:
        grid: tokens (high, wide).
        device: where the result lies.

    Raises:
        ValueError: an empty grid.
    """
    high, wide = grid
    if high < 1 or wide < 1:
        raise ValueError(f"PlainMamba: a grid of {(high, wide)} tokens is empty; give images of at least one patch")
    raster = torch.arange(high * wide, device=device)
    along_rows, rows_arrive = _snake(raster, high, wide, forth=1, back=2, turn=4)
    down, columns_arrive = _snake(raster, wide, high, forth=4, back=3, turn=1)
    # the column snake is the row snake of the transposed grid
    along_columns = down % high * wide + down // high
    row, column = raster // wide, raster % wide
    at_column = column * high + torch.where(column % 2 == 0, row, high - 1 - row)
    last = high * wide - 1
    order = torch.stack([along_rows, along_rows.flip(0), along_columns, along_columns.flip(0)])
    inverse = torch.stack([along_rows, last - along_rows, at_column, last - at_column])  # a row snake undoes itself
    arrive = torch.stack([rows_arrive, _backwards(rows_arrive), columns_arrive, _backwards(columns_arrive)])
    return ScanPaths(order, inverse, arrive)


def _snake(step: Tensor, lines: int, length: int, forth: int, back: int, turn: int) -> tuple[Tensor, Tensor]:
    """Line-wise position of each step of a snake, and how it arrives."""
    line, along = step // length, step % length
    even = line % 2 == 0
    position = line * length + torch.where(even, along, length - 1 - along)
    code = torch.where(along == 0, turn, torch.where(even, forth, back))
    return position, torch.where(step == 0, 0, code)


def _backwards(arrive: Tensor) -> Tensor:
    """Codes of the same path walked backwards: every move turns round and is made one step later."""
    moves = arrive[1:].flip(0)
    opposite = torch.where(moves <= 2, 3 - moves, 7 - moves)  # right and left, up and down
    return torch.cat([torch.zeros_like(arrive[:1]), opposite])


def scan_paths(grid: tuple[int, int], device: torch.device) -> ScanPaths:
    """The four paths over a grid, computed once a grid and device; any number of threads may ask.

    Args:
        grid: tokens (high, wide).
        device: where the result lies.

    Raises:
        ValueError: an empty grid.
    """
    if torch.compiler.is_compiling():  # a compiled graph computes them itself: no constant, no copy from the host
        return build_paths(grid, device)
    key = (*grid, device)
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    with torch.inference_mode(False):  # training may read what evaluation left here
        # the copy is complete when it returns, whichever stream reads it later
        paths = ScanPaths(*(t.to(device) for t in build_paths(grid, "cpu")))
    if all(type(t) is Tensor for t in paths):  # tensors of a tracer must not outlive it
        with _lock:
            _cache[key] = paths
            while len(_cache) > _LIMIT:
                _cache.popitem(last=False)
    return paths


def kept_paths(grid: tuple[int, int], kept: Tensor) -> KeptPaths:
    """The original paths, cut down to the tokens that are left.

    Args:
        grid: tokens (high, wide) of the whole image.
        kept: raster positions of the tokens that are left [B, K] int64, ascending.

    Raises:
        ValueError: an empty grid.
    """
    paths = scan_paths(grid, kept.device)
    count = kept.shape[1]
    step = paths.inverse[0::2][:, kept].transpose(0, 1)  # [B, 2, K], of paths 0 and 2
    order = step.argsort(dim=2)
    inverse = order.argsort(dim=2)
    order = torch.stack([order, order.flip(2)], dim=2).flatten(1, 2)
    inverse = torch.stack([inverse, count - 1 - inverse], dim=2).flatten(1, 2)
    step = torch.stack([step, grid[0] * grid[1] - 1 - step], dim=2).flatten(1, 2).gather(2, order)
    arrive = paths.direction.expand(kept.shape[0], -1, -1).gather(2, step)
    return KeptPaths(order, inverse, arrive, step)
