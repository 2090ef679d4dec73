"""The soft training form of merging: members stay where they are, and the tokens they went into take their values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.rows import add_rows, take_rows
from .gate import GateMap


class Moves(NamedTuple):
    """Which tokens merge into which.

    Attributes:
        into: the token that each one would merge into [B, N]; itself for one that cannot.
        taken: [B, N], 1 where it does and 0 where it does not; may carry gradient.
        weight: weight of every token in the means [B, N]; None weighs all alike.
        part: part of its size that counts where a token merges [B, N]; None for all of it.
    """

    into: Tensor
    taken: Tensor
    weight: Tensor | None = None
    part: Tensor | None = None

    def behind(self, prefix: int) -> Moves:
        """The same of patches alone, as moves of all tokens."""
        front = torch.arange(prefix, device=self.into.device).expand(self.into.shape[0], -1)
        into = torch.cat([front, self.into + prefix], dim=1)
        padded = (None if t is None else F.pad(t, (prefix, 0), value=v) for t, v in ((self.weight, 1), (self.part, 1)))
        return Moves(into, F.pad(self.taken, (prefix, 0)), *padded)


class GatedMergeMap(GateMap):
    """Every token stays where it is; those that merge are behind closed gates, and their values in their destinations.

    With gates and moves of exactly 0 and 1, open tokens get the numbers that a map gives them which merges and drops
    for good. A token that takes nothing in is an exact copy.

    Args:
        gate, sees_itself, decision: as for `GateMap`; the gate of a token that merges is closed.
        moves: which tokens merge; no destination merges itself.
    """

    copies = False

    def __init__(
        self, gate: Tensor, moves: Moves, sees_itself: bool = False, decision: object | None = None
    ) -> None:
        super().__init__(gate, sees_itself, decision)
        self.moves = moves

    @property
    def _merged(self) -> Tensor:
        """Tokens that merge into an open one [B, N] bool."""
        return (self.moves.taken > 0.5) & (self.gate.gather(1, self.moves.into) > 0.5)

    @property
    def assign(self) -> Tensor:
        return torch.where(self._merged, self.moves.into, super().assign)

    def shares(self, dtype: torch.dtype) -> Tensor:
        dtype = torch.promote_types(dtype, torch.float32)
        weight = torch.ones_like(self.gate) if self.moves.weight is None else self.moves.weight
        counts = (weight * (self.assign >= 0)).unsqueeze(-1).to(dtype)
        total = add_rows(torch.zeros_like(counts), self.assign.clamp(min=0), counts)
        return (counts / take_rows(total, self.assign.clamp(min=0)).clamp(min=1e-12)).squeeze(-1)

    def apply(self, x: Tensor) -> Tensor:
        into, taken, weight, _ = self.moves
        own = torch.ones_like(taken) if weight is None else weight
        given = (taken * own).unsqueeze(-1)  # [B, N, 1]
        total = own.unsqueeze(-1) + add_rows(torch.zeros_like(given), into, given)
        # as a sum of differences, what takes nothing in keeps its bits
        apart = given.to(torch.promote_types(given.dtype, x.dtype)) * (x - take_rows(x, into))
        return x + (add_rows(torch.zeros_like(apart), into, apart) / total).to(x.dtype)

    def pool(self, mass: Tensor) -> Tensor:
        counts = mass * (self.assign >= 0).unsqueeze(-1).to(mass.dtype)
        return add_rows(torch.zeros_like(mass), self.assign.clamp(min=0), counts)

    def collected(self, mass: Tensor) -> Tensor:
        """Sums of a per-token quantity [B, N, D] over what merged into each token, which all stay."""
        given = mass * (self.moves.taken > 0.5).unsqueeze(-1).to(mass.dtype)
        return mass + add_rows(torch.zeros_like(given), self.moves.into, given)

    def sized(self, size: Tensor) -> Tensor:
        part = self.moves.part
        grown = self.collected(size if part is None else size * part.unsqueeze(-1))
        return grown if part is None else grown + size * (1 - part.unsqueeze(-1))

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        read = take_rows(y, self.moves.into)
        rest = torch.zeros_like(y) if dropped is None else dropped.to(y.dtype)
        gate, merged = self.gate.unsqueeze(-1).to(y.dtype), self._merged.unsqueeze(-1)
        return gate * y + (1 - gate) * torch.where(merged, read, rest)

    def matrix(self) -> Tensor:
        into, taken, weight, _ = self.moves
        own = torch.ones_like(taken) if weight is None else weight
        rows = torch.diag_embed(own)
        moved = torch.diag_embed(own * taken).transpose(1, 2)
        target = F.one_hot(into, self.n_in).transpose(1, 2).to(moved.dtype)
        rows = rows + target @ moved
        return rows / rows.sum(-1, keepdim=True)
