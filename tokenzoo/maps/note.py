"""A map that changes nothing: a learned method notes something for its losses where it leaves the tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenMap


class NoteMap(TokenMap):
    """All tokens stay as they are, and nothing of this is in the trace; only the decision is handed on.

    Args:
        x: the tokens [B, N, C].
        decision: what the method notes, with fields `order` and `block`, see `tokenzoo.core.learned.Learned.noted`.
    """

    whole = True
    copies = True
    notes = True

    def __init__(self, x: Tensor, decision: object) -> None:
        self.batch, self.device, self.decision = x.shape[0], x.device, decision
        self.n_in = self.n_out = x.shape[1]

    @property
    def heads(self) -> Tensor:
        return torch.arange(self.n_in, device=self.device).expand(self.batch, -1)

    @property
    def assign(self) -> Tensor:
        return self.heads

    def shares(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(self.batch, self.n_in, dtype=dtype, device=self.device)

    def masked(self, visible: Tensor) -> NoteMap:
        return self

    def apply(self, x: Tensor) -> Tensor:
        return x

    def pool(self, mass: Tensor) -> Tensor:
        return mass

    def matrix(self) -> Tensor:
        return torch.eye(self.n_in, device=self.device).expand(self.batch, -1, -1)
