"""Tokens that join a sequence behind some of its blocks, in front of the others: a class token that enters late."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps import FrontedMap
from .gate import Gate
from .tokens import Inside, Layout, SideData, Tokens, TraceStep


def join_front(tokens: Tokens, front: Tensor, has_class: bool) -> Tokens:
    """A sequence with more prefix tokens in front of it, as if these had stood there while its patches got fewer.

    Sizes, places, the trace and the way back then speak of all tokens, as in a model whose prefix is there from the
    start.

    Args:
        tokens: what the blocks so far have left.
        front: values of the tokens that join [B, P, C].
        has_class: the first of them is a class token.
    """
    count = front.shape[1]
    layout = fronted_layout(tokens.layout, count, has_class)
    side = _fronted(SideData(*(getattr(tokens, name) for name in SideData._fields)), count)
    trace = None if tokens.trace is None else tuple(_step(step, count) for step in tokens.trace)
    inside = tuple(Inside(i.block, i.method, FrontedMap(i.map, count), i.after) for i in tokens.inside)
    x = torch.cat([front, tokens.x], dim=1)
    tokens = Tokens(
        x, layout, trace=trace, inside=inside, records=tokens.records, memory=tokens.memory, **side._asdict()
    )
    tokens.tell()
    return tokens


def fronted_layout(layout: Layout, count: int, has_class: bool) -> Layout:
    """A layout with more prefix tokens in front."""
    return layout._replace(num_prefix=layout.num_prefix + count, has_class=has_class)


def _step(step: TraceStep, count: int) -> TraceStep:
    before = None if step.before is None else F.pad(step.before, (0, 0, count, 0))
    return step._replace(
        map=FrontedMap(step.map, count), before=before, side=_fronted(step.side, count), prefix=step.prefix + count
    )


def _fronted(side: SideData, count: int) -> SideData:
    """Side data with that of the tokens in front: of size one, real, seen, open, and of no importance yet."""

    def rows(values: Tensor | None, value: float) -> Tensor | None:
        return None if values is None else F.pad(values, (0, 0, count, 0), value=value)

    def flat(values: Tensor | None, value: float) -> Tensor | None:
        return None if values is None else F.pad(values, (count, 0), value=value)

    positions = side.positions
    if positions is not None:
        own = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
        positions = torch.cat([own, torch.where(positions < 0, positions, positions + count)], dim=1)
    gate = None if side.gate is None else Gate(flat(side.gate.open, 1.0), side.gate.sees_itself)
    return SideData(
        size=rows(side.size, 1.0),
        valid=flat(side.valid, True),
        positions=positions,
        coords=rows(side.coords, 0.0),
        scores=flat(side.scores, 0.0),
        more_scores=tuple(flat(held, 0.0) for held in side.more_scores),
        visible=flat(side.visible, True),
        gate=gate,
    )
