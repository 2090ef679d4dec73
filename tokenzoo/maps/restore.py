"""The way back as a map of its own: tokens that a span of reductions left become the tokens that entered it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import take_rows
from .base import TokenMap
from .chain import ChainMap


class RestoreMap(TokenMap):
    """Undoes the last steps of a trace.

    Args:
        start: index of the first step that is undone.
        maps: the maps of the steps that are undone, first to last.
        before: values before each of them [B, N, C], None for maps that drop nothing.
    """

    def __init__(self, start: int, maps: tuple[TokenMap, ...], before: tuple[Tensor | None, ...]) -> None:
        self.undo, self.maps, self.before = start, maps, before
        self.n_in, self.n_out = maps[-1].n_out, maps[0].n_in

    @property
    def _forward(self) -> TokenMap:
        return self.maps[0] if len(self.maps) == 1 else ChainMap(*self.maps)

    @property
    def heads(self) -> Tensor:
        return self._forward.assign

    @property
    def assign(self) -> Tensor:
        return self._forward.heads

    def apply(self, x: Tensor) -> Tensor:
        return self._back(x, self.before)

    def _back(self, x: Tensor, before: tuple[Tensor | None, ...]) -> Tensor:
        for token_map, values in zip(reversed(self.maps), reversed(before)):
            # values of another width (keys, say) have no stash of their own: dropped tokens get zeros
            fits = values is not None and values.shape[-1] == x.shape[-1]
            x = token_map.lift(x, values if fits else None)
        return x

    def pool(self, mass: Tensor) -> Tensor:
        # the mass of a token is shared out evenly among those that read it
        heads = self.heads
        slot = heads.clamp(min=0)
        real = (heads >= 0).to(mass.dtype).unsqueeze(-1)
        readers = torch.zeros_like(mass[..., :1]).scatter_add(1, slot.unsqueeze(-1), real)
        return take_rows(mass / readers.clamp(min=1), slot) * real

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        return self._forward.apply(y)

    def masked(self, visible: Tensor) -> RestoreMap:
        return self  # every token reads what the maps in between, masked themselves, made of it

    def membership(self) -> Tensor:
        heads = self.heads
        out = torch.zeros(*heads.shape, self.n_in, device=heads.device)
        return out.scatter(2, heads.clamp(min=0).unsqueeze(2), (heads >= 0).float().unsqueeze(2))

    def matrix(self) -> Tensor:
        eye = torch.eye(self.n_in, dtype=torch.float64, device=self.heads.device)
        eye = eye.expand(self.heads.shape[0], -1, -1)
        return self._back(eye, (None,) * len(self.maps))
