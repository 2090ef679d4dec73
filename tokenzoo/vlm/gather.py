"""Taking rows out of sequences of different lengths: what stays, in order, with padding at one end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.rows import stable_order, take_rows


def compact(drop: Tensor, right: bool = False) -> tuple[Tensor, Tensor | None]:
    """Which rows are left, in order.

    Args:
        drop: [B, N] bool.
        right: whether padding of shorter prompts comes behind their rows; else in front of them.

    Returns:
        Old rows [B, K], K being the most that a prompt has left (1 where that is none), and which of them are no
        padding [B, K] bool; None where no prompt is shorter than another.
    """
    counts = (~drop).sum(1)
    least, most = (int(v) for v in torch.stack([counts.min(), counts.max()]).tolist())
    most = max(
        most, 1
    )  # of a part of a prompt all rows may go: layers get one of padding, since they run on no empty one
    if right:
        order = stable_order(drop)[:, :most]
    else:
        order = stable_order(~drop)[:, drop.shape[1] - most :]
    return order, None if least == most else ~drop.gather(1, order)


def rows_at(values: Sequence[Tensor], where: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Rows of some images as a batch; not copied where these are all rows of one.

    Args:
        values: of every image [n_rows, C].
        where: image and rows of it [N], rising, of each of the batch.

    Returns:
        [B, N, C].
    """
    found = [
        values[image] if len(rows) == len(values[image]) else values[image].index_select(0, rows)
        for image, rows in where
    ]
    return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a batch, or of one that all prompts share: x [B or 1, N, ...], index [B, K] -> [B, K, ...]."""
    if x.dim() == 2:
        return x.expand(index.shape[0], -1).gather(1, index)
    return take_rows(x.expand(index.shape[0], *x.shape[1:]), index)


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """And, where None is true everywhere."""
    if a is None or b is None:
        return a if b is None else b
    return a & b


def take_mask(mask: Any, rows: Tensor, cols: Tensor, valid: Tensor | None) -> Any:
    """An attention mask in the coordinates of the rows and columns that are left; padding is closed.

    Args:
        mask: None (causal), [B, N] of real columns, [B or 1, 1 or H, Nq, N] bool or additive, or a dict of those.
        rows: query rows that are left [B, Q].
        cols: columns that are left [B, K].
        valid: which columns are no padding [B, K] bool, None for all.

    Raises:
        TypeError: a mask of another kind (flex attention).
    """
    if isinstance(mask, dict):
        return {name: take_mask(each, rows, cols, valid) for name, each in mask.items()}
    if mask is None:
        return None if valid is None else causal(rows.shape[1], cols.shape[1], valid)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"the attention mask is {type(mask).__name__}, of which rows cannot be taken; use attn_implementation "
            "'sdpa', 'eager' or 'flash_attention_2'"
        )
    if mask.dim() == 2:
        real = take(mask, cols).bool()
        return real if valid is None else real & valid
    mask = mask.expand(cols.shape[0], *mask.shape[1:])
    mask = mask.gather(3, cols[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    if valid is None:
        return mask
    if mask.dtype == torch.bool:
        return _sees_itself(mask & valid[:, None, None, :])
    return mask.masked_fill(~valid[:, None, None, :], torch.finfo(mask.dtype).min)


def widened(mask: Any, cache: Any, queries: int) -> Any:
    """A mask with closed columns for what a static cache has no rows for yet; those of two dimensions need none.

    Args:
        mask: see `take_mask`, of as many columns as there are rows or more.
        cache: a `ReducedStaticCache`.
        queries: rows that come.
    """

    def of(mask: Any, sliding: bool) -> Any:
        if mask is None or mask.dim() != 4:
            return mask
        layer = cache.is_sliding.index(sliding) if sliding in cache.is_sliding else 0
        missing = cache.get_mask_sizes(queries, layer)[0] - mask.shape[-1]
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return torch.nn.functional.pad(mask, (0, max(0, missing)), value=closed)

    if isinstance(mask, dict):
        return {name: of(each, name == "sliding_attention") for name, each in mask.items()}
    return of(mask, False)


def causal(queries: int, keys: int, valid: Tensor) -> Tensor:
    """A causal mask [B, 1, queries, keys] of the last rows, without padding; every row sees itself."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=valid.device).tril(keys - queries)
    return _sees_itself(mask & valid[:, None, None, :])


def _sees_itself(mask: Tensor) -> Tensor:
    """A row of padding that saw nothing would be no number, and go on to be one in other rows' products with zero."""
    queries, keys = mask.shape[-2:]
    own = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries).triu(keys - queries)
    return mask | own
