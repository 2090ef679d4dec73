"""What travels from block to block: token values and the side data that reduction has to keep right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..maps import TokenMap
from ..ops.attention import full_precision
from ..ops.rows import take_rows
from .misuse import refuse_attribute, refuse_function, refuse_operator, take_field

_Sums = Callable[[Tensor], Tensor]


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


class Layout(NamedTuple):
    """Facts about the token sequence that hold for a whole forward pass.

    Attributes:
        num_prefix: class, distillation, register and added tokens at the front, never reduced.
        has_class: the first token is a class token.
        grid: patches (high, wide) of the image at the input of block 0.
        track_size: token sizes are kept (some method or pooling reads them).
        track_positions: the original index of each token is kept (RoPE, masks, grid methods).
        standalone: the blocks were called without their model; the last one hands back a plain tensor.
        keep_values: the trace keeps the values before every map that drops tokens, so that these can be given back.
        scan_rows: rows of the prefix tokens in the sequence that a model scans; in attention order says nothing.
        added: how many of the prefix tokens are not the model's own (prompts); pooling takes them for patches.
        watch: told what the layers see from there on, see `Tokens.tell`; None when nobody asks.
    """

    num_prefix: int
    has_class: bool
    grid: tuple[int, int]
    track_size: bool = False
    track_positions: bool = False
    standalone: bool = False
    keep_values: bool = False
    scan_rows: tuple[int, ...] = ()
    added: int = 0
    watch: Callable[[View], None] | None = None

    __getattr__ = refuse_attribute

    @property
    def num_patches(self) -> int:
        """Patch tokens at the input of block 0."""
        return self.grid[0] * self.grid[1]

    @property
    def own_prefix(self) -> int:
        """Prefix tokens that the model has by itself."""
        return self.num_prefix - self.added

    def check_length(self, length: int, model: str) -> None:
        """Refuses a sequence that is not the prefix and the grid.

        Args:
            length: tokens in the sequence.
            model: who got it, for the message.

        Raises:
            ValueError: another number of tokens.
        """
        whole = self.num_prefix + self.num_patches
        if torch.jit.is_tracing():  # the tracer hands sizes out as tensors
            length = int(length)
        if length == whole:
            return
        extra = f" (protect={self.added} of them added)" if self.added else ""
        message = (
            f"{model} got a sequence of {length} tokens, but {self.num_prefix} prefix tokens{extra} and a grid of "
            f"{self.grid[0]} x {self.grid[1]} patches make {whole}; "
        )
        if length > whole - self.added:
            message += (
                f"if prompts were added behind the class token, patch with protect={length - whole + self.added}; "
            )
        raise ValueError(
            f"{message}if the image size has changed, call model.set_input_size(img_size=...); between blocks hand on "
            "what the block before returned, not its values"
        )


class SideData(NamedTuple):
    """Everything about tokens but their values, as it was before a map."""

    size: Tensor | None
    valid: Tensor | None
    positions: Tensor | None
    coords: Tensor | None
    scores: Tensor | None
    more_scores: tuple[Tensor | None, ...] = ()
    visible: Tensor | None = None


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

    def reduce(self, token_map: TokenMap, block: int = -1, method: str = "", values: Tensor | None = None) -> Tokens:
        """Applies a map to the values and to all side data.

        A new token is visible if one of its members is; then hidden members count for nothing in its side data.
        A map that undoes steps takes them off the trace and gives their side data back.

        Args:
            token_map: the map; its n_in must equal the current length.
            block: index of the block, for the trace.
            method: name of the method, for the trace.
            values: new values that are known already; None applies the map to the present ones.
        """
        if token_map.n_in != self.length:
            raise ValueError(f"block {block}: a map of {token_map.n_in} tokens met a sequence of {self.length} tokens")
        if token_map.undo is not None:
            x, undone = token_map.apply(self.x), self.trace[token_map.undo]
            side = undone.side._asdict()
            tokens = Tokens(x, self.layout, **side, trace=self.trace[: token_map.undo], inside=self.inside)
            tokens.tell()
            return tokens
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
        trace = self.trace
        if trace is not None:
            before = self.x if self.layout.keep_values and token_map.drops else None
            side = SideData(
                self.size, self.valid, self.positions, self.coords, self.scores, self.more_scores, self.visible
            )
            trace = (*trace, TraceStep(block, method, token_map, before, side, self.layout.num_prefix))
        x = token_map.apply(self.x) if values is None else values
        tokens = Tokens(
            x, self.layout, size, valid, positions, coords, trace, scores, self.inside,
            visible=visible, more_scores=tuple(more),
        )  # fmt: skip
        tokens.tell()
        return tokens


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


def trace_assign(trace: tuple[TraceStep, ...], batch: int, length: int, device: torch.device) -> Tensor:
    """Final index of every original token [B, length], -1 for dropped ones."""
    assign = torch.arange(length, device=device).expand(batch, -1)
    for step in trace:
        new = step.map.assign.gather(1, assign.clamp(min=0))
        assign = torch.where(assign >= 0, new, -1)
    return assign
