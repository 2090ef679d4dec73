"""What goes along with one forward pass of a vision-language model: notes, and the rows between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Dropper

KWARG = "tokenzoo_note"  # under which the note travels down through upstream's keyword arguments


@dataclass
class Note:
    """Handed down one forward pass of the whole model, and filled on the way.

    Attributes:
        visual: rows that hold an image's [B, N] bool; None where no image comes in.
        right: the user's padding is behind the prompts.
        padding: the user's padding among the rows that come [B, N] bool; None where the mask does not say.
        asking: rows whose answer is trained, so that queries of a dropper stand there [B, N] bool; None in inference.
        order: rows of the input that are left at the end [B, K], None for all.
        valid: which of them are no padding of ours [B, K] bool, None for all.
    """

    visual: Tensor | None = None
    right: bool = False
    padding: Tensor | None = None
    asking: Tensor | None = None
    order: Tensor | None = None
    valid: Tensor | None = None


class Stage(NamedTuple):
    """One cut of a dropper."""

    dropper: Dropper
    number: int


class Held(NamedTuple):
    """Which rows a layer's part of a cache holds.

    Attributes:
        cols: rows of the language model's own sequence, past ones in front [B, P].
        valid: which are no padding [B, P] bool, None for all.
        dropped: rows of each prompt that were dropped in front of this layer [B, 1], for positions that are renumbered.
    """

    cols: Tensor
    valid: Tensor | None
    dropped: Tensor


@dataclass
class Span:
    """Handed to the layers of one forward pass of the language model.

    Attributes:
        visual: rows that may be dropped [B, N] bool; None where none may (no image, or a later turn).
        real: rows that are neither padding of the user nor ours [B, N] bool, None for all.
        valid: rows that are no padding of ours [B, N] bool, None for all.
        counts: visual rows of each prompt.
        asking: see `Note`.
        past: rows in the cache in front of these, in front of all droppers.
        tail: how many of them came in since the last pass that dropped some; every layer holds those.
        past_valid: which of the past rows are no padding [B, past] bool, None for all.
        before: what layers held of the rows in front of the tail when the pass began; others hold all.
        after: what they hold now.
        positions: of the rows [.., B or 1, N].
        rotary: makes cosines and sines of positions, given a layer's index; None keeps original positions.
        right: see `Note`.
        left: the rows that leave the last layer, and which are no padding.
        plain: whether all layers hold the same rows and none are dropped.
    """

    visual: Tensor | None
    real: Tensor | None
    valid: Tensor | None
    counts: list[int]
    asking: Tensor | None
    past: int
    tail: int
    past_valid: Tensor | None
    before: dict[int, Held]
    positions: Tensor
    rotary: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None
    right: bool
    after: dict[int, Held] = field(default_factory=dict)
    left: tuple[Tensor, Tensor | None] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.visual is None and not self.before

    def held(self, layer: int) -> Held | None:
        """What a layer held of all past rows when the pass began; None where it held all."""
        known = self.before.get(layer)
        if known is None or not self.tail:
            return known
        return self.once("tail", (known,), lambda: self._with_tail(known))

    def _with_tail(self, held: Held) -> Held:
        new = torch.arange(self.past - self.tail, self.past, device=held.cols.device).expand(len(held.cols), -1)
        valid = None if held.valid is None else torch.cat([held.valid, torch.ones_like(new, dtype=torch.bool)], 1)
        return Held(torch.cat([held.cols, new], 1), valid, held.dropped)

    def once(self, name: str, of: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What layers that hold the same rows share, made by the first of them.

        Args:
            name: what it is.
            of: the very objects that it follows from; they stay alive with it, so that no other gets their identity.
            make: makes it.
        """
        key = (name, *(id(each) for each in of))
        if key not in self.memo:
            self.memo[key] = (of, make())
        return self.memo[key][1]


class LmTokens(NamedTuple):
    """Rows between two layers, once some have been dropped or are about to be; hooks of transformers read entry 0.

    Attributes:
        x: values [B, N, D].
        rows: rows of the language model's input [B, N].
        valid: which are no padding of ours [B, N] bool, None for all.
        visual: which may be dropped [B, N] bool.
        shift: rows dropped so far in front of each [B, N], in this pass.
        dropped: rows dropped so far [B, 1], in this pass.
        previous: the layer that ran last, as `layer_signals.Reading`; None where nobody asks.
    """

    x: Tensor
    rows: Tensor
    valid: Tensor | None
    visual: Tensor
    shift: Tensor
    dropped: Tensor
    previous: Any = None


class Prompt(NamedTuple):
    """The words around images, for selectors that read them and budgets that prompts share.

    Attributes:
        ids: [B, N].
        mask: [B, N] or None.
    """

    ids: Tensor
    mask: Tensor | None


PROMPT: ContextVar[Prompt | None] = ContextVar("tokenzoo_prompt", default=None)
SEEN: ContextVar[dict[Any, Any] | None] = ContextVar("tokenzoo_seen", default=None)  # inputs of layers that are read
TOLD: ContextVar[list[Any] | None] = ContextVar("tokenzoo_told", default=None)  # decisions, for `visual_rows`

CUTS: ContextVar[list[Any] | None] = ContextVar("tokenzoo_cuts", default=None)  # what droppers drop, for `dropped_rows`


@contextmanager
def during(variable: ContextVar, value: Any) -> Iterator[Any]:
    """Context in which a variable of this thread has a value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
