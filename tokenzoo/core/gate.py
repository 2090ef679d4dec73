"""Gates of tokens while a method learns which ones to keep, and what a decision notes for its losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# what a closed token counts: its logarithm is exact in every number format, and its gradient is none's zero
_FLOOR = math.exp(-16)


class Gate(NamedTuple):
    """How open every token is, see `tokenzoo.maps.GateMap`.

    Attributes:
        open: [B, N] float32, 1 open and 0 closed; carries gradient.
        sees_itself: the diagonal of attention has no gate.
    """

    open: Tensor
    sees_itself: bool = False

    @property
    def closed(self) -> Tensor:
        """Tokens that count as dropped [B, N] bool."""
        return self.open <= 0.5

    @property
    def weight(self) -> Tensor:
        """What every token counts [B, N]: 1 if open, and e^-16 (1e-7) if closed, never 0."""
        return self.open + _FLOOR * (1 - self.open)

    def bias(self, other: Tensor | None = None, itself: bool = False) -> Tensor:
        """Bias of attention logits with the logarithm of the gates of the keys.

        Args:
            other: bias without gates [B or 1, 1 or H, 1 or N, N], None for none.
            itself: queries and keys are the same tokens, so that the diagonal can be left open.

        Returns:
            [B, 1 or H, 1 or N, N] float32.
        """
        rows = self.weight.log()[:, None, None, :]
        if itself and self.sees_itself:
            diagonal = torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device)
            rows = rows.masked_fill(diagonal, 0.0)
        return rows if other is None else other + rows

    def behind(self, open: Tensor, sees_itself: bool) -> Gate:
        """The gates behind further ones: what was closed stays closed.

        Args:
            open: of the further gates [B, N].
            sees_itself: of the further gates.
        """
        return Gate(self.open * open, self.sees_itself or sees_itself)


class Decision(NamedTuple):
    """One decision of a learned method about the patches, as its losses get to see it.

    Attributes:
        order: number of the method in its recipe.
        block: index of the block.
        gate: [B, M] float32, 1 kept and 0 dropped, of the patches alone; carries gradient.
        before: [B, M] float32, what was left of each patch until then: 1, 0 for one that was dropped before, is padding
            or hidden by a mask; carries the gradient of earlier decisions.
        share: share of those that were left which the method wants to keep, None where it wants none in particular.
        scores: what the predictor said [B, M, ...], None where the method does not hand it on.
    """

    order: int
    block: int
    gate: Tensor
    before: Tensor
    share: float | None = None
    scores: Tensor | None = None

    @property
    def after(self) -> Tensor:
        """What is left of each patch behind the decision [B, M]."""
        return self.gate * self.before

    @property
    def kept(self) -> Tensor:
        """Share of the patches that were left which each image keeps [B]."""
        return self.after.sum(1) / self.before.sum(1).clamp(min=1.0)
