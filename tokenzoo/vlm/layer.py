"""A decoder layer that may drop visual rows before it runs, and follows masks, rotary rows and cache of those left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gather import both, compact, take, take_mask
from .layer_signals import LayerRows, LayerSignals, Reading
from .passing import CUTS, Held, LmTokens, Span, Stage
from .standing_in import named

SPAN = "tokenzoo_span"


class LayerPlan(NamedTuple):
    """What one layer does.

    Attributes:
        index: of the layer.
        depth: layers of the language model.
        start: the layer from which on rows travel as `LmTokens`; depth where none drops.
        stages: cuts in front of this layer.
        read: whether the next layer's dropper is scored by this layer's attention.
        name: of the layer, for messages.
    """

    index: int
    depth: int
    start: int
    stages: tuple[Stage, ...] = ()
    read: bool = False
    name: str = ""


class ReducingDecoderLayer:
    """Mixin of decoder layers; upstream's own `forward` runs on the rows that are left."""

    tokenzoo_plan: LayerPlan

    def forward(self, hidden_states: Any, *args: Any, tokenzoo_span: Span | None = None, **kwargs: Any) -> Any:
        if args:
            kwargs = named(super().forward, (hidden_states, *args), kwargs)
            kwargs.pop("hidden_states")
        if tokenzoo_span is None:
            return super().forward(hidden_states, **kwargs)
        kwargs["position_ids"] = None  # read by flash attention alone, which takes gaps for borders of packed prompts
        span = tokenzoo_span
        if span.plain:
            return super().forward(hidden_states, **kwargs)
        plan = self.tokenzoo_plan
        t = hidden_states if isinstance(hidden_states, LmTokens) else None
        if t is None and span.visual is not None and plan.index >= plan.start:
            t = _begun(hidden_states, span)
        if t is None:
            known = span.before.get(plan.index)
            # without a mask, padding and renumbered positions the layer's own cache is all that it needs
            plain = known is None or (span.rotary is known.valid is kwargs.get("attention_mask") is None)
            held = None if plain else span.held(plan.index)
            if held is not None:
                kwargs |= _decoding(hidden_states, held, span, plan, kwargs)
            return super().forward(hidden_states, **kwargs)
        for stage in plan.stages:
            t = self._dropped(t, stage, span, kwargs["position_embeddings"])
        held, rope = _held(t, span, plan), _rope(t, span, plan, kwargs["position_embeddings"])
        mask = kwargs["attention_mask"]
        kwargs["attention_mask"] = span.once(
            "mask", (held, mask), lambda: take_mask(mask, t.rows, held.cols, held.valid)
        )
        kwargs["position_embeddings"] = rope
        y = super().forward(t.x, **kwargs)
        previous = Reading(self, t.x, rope, _real(t, span)) if plan.read else None
        if plan.index == plan.depth - 1:
            span.left = (t.rows, t.valid)
            return y
        return t._replace(x=y, previous=previous)

    def _dropped(self, t: LmTokens, stage: Stage, span: Span, table: tuple[Tensor, Tensor]) -> LmTokens:
        """The rows behind a cut."""
        dropper, number, plan = stage.dropper, stage.number, self.tokenzoo_plan
        keep = [min(dropper.count(n, number), n) for n in span.counts]
        asking = None if span.asking is None else span.asking.gather(1, t.rows)
        rows = LayerRows(t.x, t.visual, _real(t, span), keep, asking)
        reading = t.previous
        if dropper.scored_by == "own":
            reading = Reading(self, t.x, _rope(t, span, plan, table), rows.real)
        left = dropper.decide(rows, LayerSignals(reading, rows), number)
        gone = t.visual & ~left.keep
        notes = CUTS.get()
        if notes is not None:
            notes.append((plan.index, t.rows, gone))
        padding = None if t.valid is None else ~t.valid
        order, valid = compact(gone if padding is None else gone | padding, span.right)
        before = gone.long().cumsum(1) - gone.long()
        x = take(t.x if left.x is None else left.x, order)
        valid = both(valid, None if t.valid is None else t.valid.gather(1, order))
        visual = t.visual.gather(1, order)
        if valid is not None:
            x, visual = torch.where(valid.unsqueeze(-1), x, torch.zeros_like(x)), visual & valid
        shift = (t.shift + before).gather(1, order)
        dropped = t.dropped + gone.sum(1, keepdim=True)
        return LmTokens(x, t.rows.gather(1, order), valid, visual, shift, dropped)


def _begun(x: Tensor, span: Span) -> LmTokens:
    """All rows, in front of the first cut."""
    batch, n = x.shape[:2]
    rows = torch.arange(n, device=x.device).expand(batch, -1)
    zeros = torch.zeros_like(rows)
    return LmTokens(x, rows, span.valid, span.visual, zeros, zeros[:, :1])


def _real(t: LmTokens, span: Span) -> Tensor:
    """Rows that are neither the user's padding nor ours."""
    real = torch.ones_like(t.visual) if span.real is None else span.real.gather(1, t.rows)
    return real if t.valid is None else real & t.valid


def _held(t: LmTokens, span: Span, plan: LayerPlan) -> Held:
    """What this layer's part of the cache holds behind the pass, noted on the way."""
    old = span.held(plan.index)

    def make() -> Held:
        cols, valid, dropped = t.rows + span.past, t.valid, t.dropped
        if span.past:
            past = torch.arange(span.past, device=cols.device).expand(cols.shape[0], -1)
            past = Held(past, span.past_valid, torch.zeros_like(dropped)) if old is None else old
            if past.valid is not None or valid is not None:
                parts = ((past.cols, past.valid), (t.rows, valid))
                valid = torch.cat([torch.ones_like(c, dtype=torch.bool) if v is None else v for c, v in parts], 1)
            cols, dropped = torch.cat([past.cols, cols], 1), past.dropped + dropped
        return Held(cols, valid, dropped)

    held = span.once("held", (old, t.rows), make)
    span.after[plan.index] = held
    return held


def _rope(t: LmTokens, span: Span, plan: LayerPlan, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rows that are left; a gather, unless cuts renumber positions."""
    if span.rotary is None:
        return tuple(_take_table(part, t.rows) for part in table)
    old = span.held(plan.index)
    shift = t.shift if old is None else t.shift + old.dropped
    return span.rotary(take(span.positions, t.rows) - shift, plan.index)


def _take_table(part: Tensor, rows: Tensor) -> Tensor:
    """Rows of a rotary table [B or 1, N, d], or of one per axis of an image [3, B, N, d]."""
    return take(part, rows) if part.dim() == 3 else torch.stack([take(axis, rows) for axis in part])


def _decoding(x: Tensor, held: Held, span: Span, plan: LayerPlan, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What changes for a layer that holds fewer rows than the first one, where nothing is dropped in this pass."""
    changed: dict[str, Any] = {}
    if span.rotary is not None:
        changed["position_embeddings"] = span.rotary(span.positions - held.dropped, plan.index)
    mask = kwargs.get("attention_mask")
    if mask is None and held.valid is None:
        return changed

    def make() -> Any:
        rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        valid = held.valid
        if valid is not None:
            valid = torch.cat([valid, torch.ones_like(rows, dtype=torch.bool)], 1)
        return take_mask(mask, rows, torch.cat([held.cols, rows + span.past], 1), valid)

    changed["attention_mask"] = span.once("mask", (held, mask), make)
    return changed
