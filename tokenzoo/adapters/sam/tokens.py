"""Shrunken windows as one map of all tokens, for pictures of what became of every patch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.tokens import Layout, Tokens
from ...maps import TokenMap
from .blocks import WindowedMap, from_windows, to_windows


class WindowsMap(TokenMap):
    """A map inside every window, as a map from all tokens to all tokens that are left, both in raster order.

    Args:
        inside: the map of the windows [B * windows, tokens, C].
        size: tokens (high, wide) of the full map; zeros fill up windows at the border.
        window: tokens (down, right) of a window.
        cells: tokens (down, right) that are left of it.
    """

    def __init__(
        self, inside: TokenMap, size: tuple[int, int], window: tuple[int, int], cells: tuple[int, int]
    ) -> None:
        self.inside, self.size, self.window, self.cells = inside, size, window, cells
        self.drops, self.linear = inside.drops, inside.linear
        self.fewer = tuple(-(-length // side) * left for length, side, left in zip(size, window, cells))
        self.n_in, self.n_out = size[0] * size[1], self.fewer[0] * self.fewer[1]
        self.grid_out = self.fewer

    def _cut(self, x: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        """Rows [B, N, D] of a map as rows of its windows [B * windows, n, D]."""
        return to_windows(x.unflatten(1, size), window).flatten(1, 2)

    def _join(self, x: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        """Undoes `_cut`."""
        return from_windows(x.unflatten(1, window), size).flatten(1, 2)

    def _numbers(self, like: Tensor, size: tuple[int, int], window: tuple[int, int]) -> Tensor:
        """Place in the whole map of every row of every window [B * windows, n], -1 where it was filled up."""
        index = torch.arange(1, size[0] * size[1] + 1, device=like.device).view(1, -1, 1)
        index = self._cut(index, size, window).squeeze(-1) - 1
        return index.repeat(like.shape[0] // index.shape[0], 1)

    @property
    def heads(self) -> Tensor:
        heads = self.inside.heads
        places = self._numbers(heads, self.size, self.window).gather(1, heads.clamp(min=0))
        places = torch.where(heads >= 0, places, -1)
        return self._join(places.unsqueeze(-1), self.fewer, self.cells).squeeze(-1)

    @property
    def assign(self) -> Tensor:
        assign = self.inside.assign
        places = self._numbers(assign, self.fewer, self.cells).gather(1, assign.clamp(min=0))
        places = torch.where(assign >= 0, places, -1)
        return self._join(places.unsqueeze(-1), self.size, self.window).squeeze(-1)

    def apply(self, x: Tensor) -> Tensor:
        return self._join(self.inside.apply(self._cut(x, self.size, self.window)), self.fewer, self.cells)

    def pool(self, mass: Tensor) -> Tensor:
        return self._join(self.inside.pool(self._cut(mass, self.size, self.window)), self.fewer, self.cells)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        stash = None if dropped is None else self._cut(dropped, self.size, self.window)
        return self._join(self.inside.lift(self._cut(y, self.fewer, self.cells), stash), self.size, self.window)

    def matrix(self) -> Tensor:
        heads = self.inside.heads
        eye = torch.eye(self.n_in, dtype=torch.float64, device=heads.device)
        batch = heads.shape[0] * heads.shape[1] // self.n_out
        return self.apply(eye.expand(batch, -1, -1))


def as_tokens(state: WindowedMap, window: tuple[int, int]) -> Tokens:
    """The tokens of a map in raster order, with a trace of whole maps.

    Args:
        state: a map, its windows shrunk or not.
        window: tokens (down, right) of a full window.
    """
    trace = tuple(
        step._replace(map=WindowsMap(step.map, state.size, window, state.window), before=None) for step in state.trace
    )
    return Tokens(state.x.flatten(1, 2), Layout(0, False, state.size), trace=trace)
