"""What some methods read of an attention map: its diagonal and its column sums; and attention on its largest entries.

On a CPU one image at a time is in cache: the map, what is read of it and the output together cost little more than
fused attention. Elsewhere, and in traced graphs, fused attention runs and the map is computed anew in slices of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import CACHE, Heads, attention_rows, drop_map, row_slices


class MapStatistics(NamedTuple):
    """Sums over parts of an attention map, per head.

    Attributes:
        own: attention of every token to itself [B, H, N] float32.
        received: attention that every token receives from all queries [B, H, N] float32.
        first: attention of the first token to every one [B, H, N] float32.
        rows: the map itself [B, H, N, N], where it was written out anyway.
    """

    own: Tensor
    received: Tensor
    first: Tensor
    rows: Tensor | None = None

    @classmethod
    def of_rows(cls, rows: Tensor, start: int = 0) -> MapStatistics:
        """Of the rows of the queries from `start` on [B, H, Q, N]; `own` of these alone.

        Copies: views would keep all rows, slice by slice the whole map.
        """
        own = rows.diagonal(start, -2, -1)[..., : rows.shape[-2]]
        return cls(own.clone(), rows.sum(-2), rows[..., 0, :].clone())

    @classmethod
    def of_slices(cls, parts: Sequence[MapStatistics]) -> MapStatistics:
        """Of slices of queries, first to last."""
        if len(parts) == 1:
            return parts[0]
        received = sum(part.received for part in parts[1:]) + parts[0].received
        return cls(torch.cat([part.own for part in parts], dim=-1), received, parts[0].first)

    @classmethod
    def joined(cls, parts: Sequence[MapStatistics], dim: int) -> MapStatistics:
        """Of several images (dim 0) or attention layers (dim 1)."""
        rows = None if parts[0].rows is None else torch.cat([part.rows for part in parts], dim)
        return cls(*(torch.cat(found, dim) for found in zip(*(part[:3] for part in parts))), rows)


def map_statistics(heads: Heads, bias: Tensor | None = None, queries: Tensor | None = None) -> MapStatistics:
    """Diagonal and column sums of the map, which is computed in slices and never stored.

    Args:
        heads: projected heads.
        bias: bias of the logits, see `attend`.
        queries: [B, N] bool, queries that count (real tokens that no mask hides); None counts all.
    """
    with torch.no_grad():
        if _by_image(heads):
            parts = []
            for one, own_bias, at in _images(heads, bias):
                found = []
                for start, stop in _in_cache(one):
                    rows = _counted(attention_rows(one, start, stop, own_bias), queries, at, start, stop)
                    found.append(MapStatistics.of_rows(rows, start))
                parts.append(MapStatistics.of_slices(found))
            return MapStatistics.joined(parts, 0)
        found = []
        for start, stop in row_slices(heads.q.shape[2], heads):
            rows = _counted(attention_rows(heads, start, stop, bias), queries, slice(None), start, stop)
            found.append(MapStatistics.of_rows(rows, start))
        return MapStatistics.of_slices(found)


def attend_and_read(heads: Heads, bias: Tensor | None = None) -> tuple[Tensor, MapStatistics] | None:
    """Output [B, N, H * Dv] and statistics in one go, None where fused attention and a second look are better.

    Args:
        heads: projected heads.
        bias: see `attend`.
    """
    if not _by_image(heads) or not heads.fused or heads.dropout:
        return None
    outs, parts = [], []
    for one, own_bias, _ in _images(heads, bias):
        found, out = [], []
        for start, stop in _in_cache(one):
            rows = attention_rows(one, start, stop, own_bias)
            found.append(MapStatistics.of_rows(rows.detach(), start))
            out.append((rows.to(one.v.dtype) @ one.v).transpose(1, 2).flatten(2))
        parts.append(MapStatistics.of_slices(found))
        outs += [out[0] if len(out) == 1 else torch.cat(out, dim=1)]
    return torch.cat(outs), MapStatistics.joined(parts, 0)


def attend_sparsely(
    heads: Heads, bias: Tensor | None, share: float, queries: Tensor | None = None
) -> tuple[Tensor, MapStatistics]:
    """Attention on the largest entries of every head's map, whose rows no longer sum to one, and what was read of it.

    Args:
        heads: projected heads.
        bias: see `attend`.
        share: share of the entries that stay, in (0, 1).
        queries: [B, N] bool, tokens that count: the others look at nothing, and have no part in the share.
    """
    total = heads.q.shape[2]
    rows = attention_rows(heads, 0, total, bias)
    flat = rows.detach().flatten(2)
    if queries is None:
        bound = flat.kthvalue(max(1, int(total * total * (1 - share))), dim=2, keepdim=True).values
    else:
        rows = rows.masked_fill(~queries[:, None, :, None], 0)
        flat = rows.detach().flatten(2)
        count = queries.sum(1) ** 2
        # entries of the others are zero, and come first
        kth = (total * total - count + (count * (1 - share)).long().clamp(min=1) - 1).clamp(min=0)
        bound = flat.sort(dim=2).values.gather(2, kth.view(-1, 1, 1).expand(-1, flat.shape[1], -1))
    rows = rows * (rows >= bound.unsqueeze(3))
    mixed = rows if heads.talk is None else heads.talk.map(rows, bias)
    out = drop_map(heads, mixed.to(heads.v.dtype)) @ heads.v
    rows = rows.detach()
    return out.transpose(1, 2).flatten(2), MapStatistics.of_rows(rows)._replace(rows=rows)


def _by_image(heads: Heads) -> bool:
    """Whether maps are computed an image at a time: on a CPU, where rows of one fit into caches."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return heads.q.device.type == "cpu" and not traced and heads.q.shape[0] > 0


def _images(heads: Heads, bias: Tensor | None) -> Iterator[tuple[Heads, Tensor | None, slice]]:
    for i in range(heads.q.shape[0]):
        at = slice(i, i + 1)
        v = None if heads.v is None else heads.v[at]
        own = bias if bias is None or bias.shape[0] == 1 else bias[at]
        placed = None if heads.placed is None else heads.placed.images(at)
        yield heads._replace(q=heads.q[at], k=heads.k[at], v=v, placed=placed), own, at


def _in_cache(heads: Heads) -> list[tuple[int, int]]:
    """(start, stop) of slices of the queries of one image whose rows fit into cache."""
    total, step = heads.q.shape[2], max(1, CACHE // (heads.q.shape[1] * heads.k.shape[2]))
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _counted(rows: Tensor, queries: Tensor | None, at: slice, start: int, stop: int) -> Tensor:
    """Rows without those of queries that do not count: a hidden one may see nothing, and its row be no number."""
    return rows if queries is None else rows.masked_fill(~queries[at, None, start:stop, None], 0)
