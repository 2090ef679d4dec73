"""What travels from block to block: token values and the side data that reduction has to keep right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maps import TokenMap
from ..ops.attention import full_precision
from ..ops.rows import take_rows
from .gate import Decision, Gate
from .layout import Layout
from .misuse import refuse_attribute, refuse_function, refuse_operator, take_field
from .trace import Inside, SideData, TraceStep, View, trace_assign

__all__ = ["Inside", "Layout", "SideData", "Tokens", "TraceStep", "View", "trace_assign"]

_Sums = Callable[[Tensor], Tensor]


class Tokens(NamedTuple):
    """Tokens and their side data, handed from block to block.

    Attributes:
        x: values [B, N, C], prefix tokens first.
        layout: facts that do not change during the pass.
        size: how many patches each token stands for [B, N, 1] float32, None while all are one or nobody asks.
        valid: [B, N] bool, False for padding (images that keep fewer tokens than others); None when all are real.
        positions: index in the original sequence [B, N] int64, -1 for tokens without a place; None while untouched.
        coords: mass-weighted mean patch coordinate [B, N, 2] float32 (row, column); None unless RoPE asks for it.
        trace: the reductions so far; None when nobody asks.
        scores: importance that a method carries from block to block [B, N] float32; None before there is one.
        more_scores: the same of further methods in the recipe, each has its own; see `seen_by`.
        inside: what merged around branches so far; kept along with the trace.
        rows: rows of the prefix tokens in the sequence that is scanned, a tuple or [B, 1]; None while untouched.
        visible: [B, N] bool, False for tokens that a mask hides from all others and for padding; None without a mask.
        gate: how open every token is while a method learns which ones to keep; None where nothing is gated. Closed
            tokens are not `visible`.
        records: decisions of learned methods so far, for their losses.
        memory: what methods keep of the tokens that entered the first block they act in; see `remembered`.
    """

    x: Tensor
    layout: Layout
    size: Tensor | None = None
    valid: Tensor | None = None
    positions: Tensor | None = None
    coords: Tensor | None = None
    trace: tuple[TraceStep, ...] | None = None
    scores: Tensor | None = None
    inside: tuple[Inside, ...] = ()
    rows: tuple[int, ...] | Tensor | None = None
    visible: Tensor | None = None
    more_scores: tuple[Tensor | None, ...] = ()
    gate: Gate | None = None
    records: tuple[Decision, ...] = ()
    memory: tuple[Tensor | None, ...] = ()

    def remembered(self, scorer: int) -> Tensor | None:
        """What the method of this number, `Step.scorer`, remembers; None for nothing yet."""
        return self.memory[scorer] if scorer < len(self.memory) else None

    def remembering(self, value: Tensor, scorer: int) -> Tokens:
        """The tokens with what the method of this number remembers."""
        memory = (*self.memory, *[None] * (scorer + 1 - len(self.memory)))
        return self._replace(memory=(*memory[:scorer], value, *memory[scorer + 1 :]))

    def seen_by(self, scorer: int) -> Tokens:
        """The tokens with `scores` of one of the methods that carry some.

        Args:
            scorer: its number among them, `Step.scorer`.
        """
        if scorer == 0:
            return self
        return self._replace(scores=self.more_scores[scorer - 1] if scorer <= len(self.more_scores) else None)

    def with_scores(self, scores: Tensor | None, scorer: int) -> Tokens:
        """The tokens with new scores of one of the methods that carry some."""
        if scorer == 0:
            return self._replace(scores=scores)
        more = (*self.more_scores, *[None] * (scorer - len(self.more_scores)))
        return self._replace(more_scores=(*more[: scorer - 1], scores, *more[scorer:]))

    # code that takes them for a tensor gets one sentence
    __getattr__ = refuse_attribute
    __getitem__ = take_field
    __torch_function__ = classmethod(refuse_function)
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = refuse_operator
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = refuse_operator

    @property
    def length(self) -> int:
        """N, tokens in the sequence, prefix and padding included."""
        length = self.x.shape[1]
        # the tracer hands sizes out as tensors, in which a share of them would be rounded in float32
        return int(length) if torch.jit.is_tracing() else length

    @property
    def num_patches(self) -> int:
        """Tokens after the prefix."""
        return self.length - self.layout.num_prefix

    @property
    def valid_patches(self) -> Tensor | None:
        """Real patch tokens of each image [B], None when there is no padding."""
        return None if self.valid is None else self.valid[:, self.layout.num_prefix :].sum(1)

    @property
    def left(self) -> Tensor:
        """What is left of every token [B, N] float32: 0 for padding and hidden tokens, and as far as its gate is open.

        Of tokens that a method in training has dropped, 0 as well, with the gradient of its decision.
        """
        opened = self.x.new_ones(self.x.shape[:2], dtype=torch.float32) if self.gate is None else self.gate.open
        real = self.valid if self.visible is None else self.visible
        return opened if real is None else opened * real

    @property
    def seen_patches(self) -> Tensor | None:
        """Patch tokens that count [B, M] bool, neither padding nor hidden; None when all do."""
        seen = self.valid if self.visible is None else self.visible
        return None if seen is None else seen[:, self.layout.num_prefix :]

    def sizes(self) -> Tensor:
        """Token sizes [B, N, 1] float32, ones where nothing was merged yet."""
        if self.size is not None:
            return self.size
        return torch.ones(self.x.shape[0], self.length, 1, device=self.x.device)

    def original_positions(self) -> Tensor:
        """Index of each token in the original sequence [B, N] int64."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.length, device=self.x.device).expand(self.x.shape[0], -1)

    def tell(self, merge: TokenMap | None = None, queries: tuple[TraceStep, ...] | None = None) -> None:
        """Tells whoever watches the pass that layers see these tokens from here on; see `View`."""
        if self.layout.watch is not None and self.trace is not None:
            self.layout.watch(View(self.trace, merge, queries))

    def _restored_scores(self, token_map: TokenMap, before: SideData) -> dict[str, Any]:
        """Scores of tokens that are given back: what the tokens since then carry, else what they had themselves."""
        held = (self.scores, *self.more_scores)
        old = (before.scores, *before.more_scores, *[None] * len(held))[: len(held)]
        first, *more = (
            past if now is None else token_map.pool(now.unsqueeze(-1)).squeeze(-1) for now, past in zip(held, old)
        )
        return {"scores": first, "more_scores": tuple(more)}

    def reduce(self, token_map: TokenMap, block: int = -1, method: str = "", values: Tensor | None = None) -> Tokens:
        """Applies a map to the values and to all side data.

        A new token is visible if one of its members is; then hidden members count for nothing in its side data.
        A map that undoes steps takes them off the trace and gives their side data back. One with gates closes them
        and changes nothing else.

        Args:
            token_map: the map; its n_in must equal the current length.
            block: index of the block, for the trace.
            method: name of the method, for the trace.
            values: new values that are known already; None applies the map to the present ones.
        """
        if token_map.n_in != self.length:
            raise ValueError(f"block {block}: a map of {token_map.n_in} tokens met a sequence of {self.length} tokens")
        records = self.records if token_map.decision is None else (*self.records, token_map.decision)
        if token_map.notes:
            return self._replace(records=records)
        if token_map.undo is not None:
            x, undone = token_map.apply(self.x), self.trace[token_map.undo]
            side = undone.side._asdict() | self._restored_scores(token_map, undone.side)
            side |= {"trace": self.trace[: token_map.undo], "inside": self.inside, "memory": self.memory}
            tokens = Tokens(x, self.layout, **side)
            tokens = tokens._replace(records=records)
            tokens.tell()
            return tokens
        if token_map.gate is not None:
            return self._gated(token_map, block, method)._replace(records=records)
        visible, of_visible = self.visible, None
        if visible is not None:
            of_visible, visible = _only_visible(token_map, visible)
        pool = token_map.pool if of_visible is None else of_visible(token_map.pool)
        size = self.size
        if self.layout.track_size:
            with full_precision(self.x):
                mass = partial(token_map.mass, batch=self.x.shape[0], device=self.x.device)
                size = mass(size)
                if size is not None and of_visible is not None:
                    size = of_visible(mass)(self.sizes())
            size = None if size is None else size.detach()
        valid = token_map.valid
        if valid is None and self.valid is not None:
            valid = _side(self.valid.unsqueeze(-1), token_map.heads, True).squeeze(-1)
        positions = self.positions
        if self.layout.track_positions:
            positions = _side(self.original_positions().unsqueeze(-1), token_map.heads, -1).squeeze(-1)
        coords = self.coords
        if coords is not None:
            with full_precision(self.x):
                mass = self.sizes()
                coords = (pool(coords * mass) / pool(mass).clamp(min=1e-12)).detach()
        # attention to a group is the sum over its members
        scores, *more = (
            None if held is None else pool(held.unsqueeze(-1)).squeeze(-1) for held in (self.scores, *self.more_scores)
        )
        gate = self.gate
        if gate is not None:
            mass = self.sizes()
            opened = pool(gate.open.unsqueeze(-1) * mass) / pool(mass).clamp(min=1e-12)
            gate = gate._replace(open=opened.squeeze(-1))
        trace = self._traced(token_map, block, method)
        x = token_map.apply(self.x) if values is None else values
        tokens = Tokens(
            x, self.layout, size, valid, positions, coords, trace, scores, self.inside,
            visible=visible, more_scores=tuple(more), gate=gate, records=records, memory=self.memory,
        )  # fmt: skip
        tokens.tell()
        return tokens

    def _traced(self, token_map: TokenMap, block: int, method: str) -> tuple[TraceStep, ...] | None:
        """The trace with one reduction more; None where nobody asks for it."""
        if self.trace is None:
            return None
        before = self.x if self.layout.keep_values and token_map.drops else None
        side = SideData(
            self.size, self.valid, self.positions, self.coords, self.scores, self.more_scores, self.visible, self.gate
        )
        return (*self.trace, TraceStep(block, method, token_map, before, side, self.layout.num_prefix))

    def _gated(self, token_map: TokenMap, block: int, method: str) -> Tokens:
        """All tokens stay, some of them behind closed gates; for later methods these are hidden."""
        gate = Gate(token_map.gate.float(), token_map.sees_itself)
        gate = gate if self.gate is None else self.gate.behind(*gate)
        real = self.valid if self.visible is None else self.visible
        visible = ~gate.closed if real is None else real & ~gate.closed
        tokens = self._replace(gate=gate, visible=visible, trace=self._traced(token_map, block, method))
        if not token_map.copies:
            tokens = tokens._replace(**self._collected(token_map))
        tokens.tell()
        return tokens

    def _collected(self, token_map: TokenMap) -> dict[str, Any]:
        """Values and side data where tokens take in others that stay behind closed gates."""
        size, coords = self.size, self.coords
        with full_precision(self.x), torch.no_grad():
            if self.layout.track_size:
                size = token_map.sized(self.sizes())
            if coords is not None:
                mass = self.sizes()
                coords = token_map.collected(coords * mass) / token_map.collected(mass).clamp(min=1e-12)
            scores, *more = (
                None if held is None else token_map.collected(held.unsqueeze(-1)).squeeze(-1)
                for held in (self.scores, *self.more_scores)
            )
        x = token_map.apply(self.x)
        return {"x": x, "size": size, "coords": coords, "scores": scores, "more_scores": tuple(more)}


def _only_visible(token_map: TokenMap, visible: Tensor) -> tuple[Callable[[_Sums], _Sums], Tensor]:
    """Makes sums of what they count, without hidden members where there are visible ones; and which tokens these are.

    Args:
        token_map: the map.
        visible: [B, N] bool, of the tokens before it.
    """
    seen = visible.unsqueeze(-1)
    after = token_map.pool(seen.float()) > 0

    def of_visible(sums: _Sums) -> _Sums:
        return lambda mass: torch.where(after, sums(mass * seen), sums(mass))

    return of_visible, after.squeeze(-1)


def _side(values: Tensor, heads: Tensor, missing: int | bool) -> Tensor:
    """Per-token side data of the tokens that head the new ones, `missing` where there is none."""
    taken = take_rows(values, heads.clamp(min=0))
    return torch.where((heads >= 0).unsqueeze(-1), taken, torch.full_like(taken, missing))
