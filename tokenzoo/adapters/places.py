"""Places of a grid and the tokens they belong to, through a whole trace at once.

Going back map by map copies all values once per map. Where every place belongs to one token, or was dropped, the maps
compose to one index for reading and one weighted sum for writing, whatever the number of reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.lift import Fill
from ..core.tokens import TraceStep
from ..maps import TokenMap
from ..ops.rows import add_rows, scatter_values, stable_order, take_rows


class Places(NamedTuple):
    """Where every place of the grid reads and writes.

    Attributes:
        read: row that a place reads [B, N]: tokens first, then dropped ones, then zeros.
        token: token that a place belongs to [B, N], -1 for none.
        share: share of a place in the value of its token [B, N, 1], at least float32.
        heads: place that a token is a copy of [B, N'], where tokens were only dropped; else None.
        valid: [B, N'] bool, False for padding; None where all tokens are real. Only needed with `heads`.
        lost: values of the residual stream that dropped tokens had [B, M, C]; None where none is read.
        zeros: whether some places may read zeros.
        count: tokens.
    """

    read: Tensor
    token: Tensor
    share: Tensor
    heads: Tensor | None
    valid: Tensor | None
    lost: Tensor | None
    zeros: bool
    count: int

    def spread(self, values: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        """Values of tokens [B, N', D] at all places [B, N, D]; `through` turns the residual stream into such values."""
        parts = [values]
        if self.lost is not None:
            parts.append(through(self.lost).to(values.dtype))
        if self.zeros:
            parts.append(torch.zeros_like(values[:, :1]))
        return take_rows(values if len(parts) == 1 else torch.cat(parts, dim=1), self.read)

    def part(self, start: int, stop: int) -> Places:
        """The same for some images of the batch."""
        return Places(*(part[start:stop] if isinstance(part, Tensor) else part for part in self))

    def collect(self, values: Tensor) -> Tensor:
        """What the maps make of values at all places [B, N, D]: [B, N', D]."""
        if self.heads is not None:
            kept = take_rows(values, self.heads)
            return kept if self.valid is None else kept * self.valid.unsqueeze(-1).to(kept.dtype)
        start = values.new_zeros(values.shape[0], self.count, values.shape[2])
        return add_rows(start, self.token.clamp(min=0), values * self.share.to(values.dtype))


def places_of(trace: tuple[TraceStep, ...], fill: Fill, dtype: torch.dtype) -> Places | None:
    """The composition of a trace; None where it is empty, some map mixes tokens, or dropped ones are mixed anew.

    Args:
        trace: reductions, first to last, with the values in front of those that drop tokens.
        fill: what dropped tokens get.
        dtype: of the values that will be spread and collected.
    """
    drops = any(step.map.drops for step in trace)
    if not trace or (drops and fill.kind == "nearest"):
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    shares = [step.map.shares(dtype) for step in trace]
    if any(share is None for share in shares):
        return None
    batch, device = shares[0].shape[0], shares[0].device
    token = torch.arange(trace[0].map.n_in, device=device).expand(batch, -1)
    share, extra = torch.ones_like(token, dtype=dtype), torch.full_like(token, -1)
    heads = token if all(step.map.copies for step in trace) else None
    lost: list[Tensor] = []
    offset = 0
    for step, own in zip(trace, shares):
        at, gone = token.clamp(min=0), token < 0
        if step.map.drops and fill.kind == "stash":
            rows, slot = lost_tokens(step.map)
            here = step.map.dropped.gather(1, at) & ~gone & (extra < 0)
            extra = torch.where(here, slot.gather(1, at) + offset, extra)
            lost.append(take_rows(step.before, rows))
            offset += rows.shape[1]
        share = share * own.gather(1, at)
        heads = None if heads is None else heads.gather(1, step.map.heads)
        token = torch.where(gone, -1, step.map.assign.gather(1, at))
    count = trace[-1].map.n_out
    zeros = drops and fill.kind == "zero"
    read = torch.where(extra >= 0, extra + count, torch.where(token >= 0, token, count if zeros else 0))
    share = (share * (token >= 0)).unsqueeze(-1)
    stash = torch.cat(lost, dim=1) if lost else None
    return Places(read, token, share, heads, trace[-1].map.valid, stash, zeros, count)


def lost_tokens(token_map: TokenMap) -> tuple[Tensor, Tensor]:
    """Dropped tokens of a map [B, M], and where among those every token stands [B, N]."""
    # where images may drop different numbers of tokens, every token is looked at
    count = token_map.n_in if token_map.num_dropped is None else max(1, token_map.num_dropped)
    rows = stable_order((~token_map.dropped).long())[:, :count]
    slots = torch.arange(count, device=rows.device).expand_as(rows)
    return rows, scatter_values(token_map.n_in, rows, slots, 0)
