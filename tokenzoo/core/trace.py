"""What a pass remembers of its reductions: one step per map, with the side data before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import TokenMap
from .gate import Gate


class SideData(NamedTuple):
    """Everything about tokens but their values, as it was before a map."""

    size: Tensor | None
    valid: Tensor | None
    positions: Tensor | None
    coords: Tensor | None
    scores: Tensor | None
    more_scores: tuple[Tensor | None, ...] = ()
    visible: Tensor | None = None
    gate: Gate | None = None


class TraceStep(NamedTuple):
    """One reduction as it happened.

    Attributes:
        block: index of the block.
        method: name of the method.
        map: the map.
        before: values before it [B, N, C]; None unless dense output needs them.
        side: side data before it.
        prefix: prefix tokens in front of the sequence.
    """

    block: int
    method: str
    map: TokenMap
    before: Tensor | None
    side: SideData
    prefix: int


class Inside(NamedTuple):
    """Tokens that merged around a branch of a block and came apart again after it.

    Attributes:
        block: index of the block.
        method: names of the methods.
        map: the map.
        after: reductions that the sequence had seen by then.
    """

    block: int
    method: str
    map: TokenMap
    after: int


class View(NamedTuple):
    """What a layer inside of a block sees.

    Attributes:
        trace: the reductions that the sequence has gone through.
        merge: the map around the branch that the layer is part of, None where its tokens are those of the sequence.
        queries: of an attention map, the reductions behind its rows where these are not those behind its columns.
    """

    trace: tuple[TraceStep, ...]
    merge: TokenMap | None = None
    queries: tuple[TraceStep, ...] | None = None


def trace_assign(trace: tuple[TraceStep, ...], batch: int, length: int, device: torch.device) -> Tensor:
    """Final index of every original token [B, length], -1 for dropped ones."""
    assign = torch.arange(length, device=device).expand(batch, -1)
    for step in trace:
        new = step.map.assign.gather(1, assign.clamp(min=0))
        assign = torch.where(assign >= 0, new, -1)
    return assign
