"""The soft training form of keeping: nothing is removed, and every token has a gate that carries gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenMap


class GateMap(TokenMap):
    """Every token stays where it is, behind a gate: what is closed counts for nothing in later attention and pooling.

    The gate joins the logits of a key as the logarithm of how open it is. A closed token keeps e^-16 (1e-7) of its
    weight, through which a predictor learns what an open one would have done. With gates of 0 and 1 (straight through:
    hard values, soft gradient) open tokens get the numbers that `KeepMap` gives them, up to that rest.

    The diagonal: by default a closed token does not see itself either. What it becomes is read by nobody, so open
    tokens do not notice; but the gradient of its gate is taken at that value. With `sees_itself`, the diagonal of
    attention has no gate, as in DynamicViT's softmax with policy: a closed token goes on by itself. That needs a bias
    of N x N numbers per image, where one of N is enough otherwise.

    Args:
        gate: [B, N], 1 open and 0 closed, prefix tokens 1; values between the two are allowed. Gradient flows back.
        sees_itself: a token's own gate does not count in what it attends to.
        decision: what the method notes about this, see `tokenzoo.core.learned.Decision`.

    Source: Rao et al., "DynamicViT", NeurIPS 2021 (masked attention in training).
    """

    drops = True
    whole = True
    copies = True

    def __init__(self, gate: Tensor, sees_itself: bool = False, decision: object | None = None) -> None:
        self.gate, self.sees_itself, self.decision = gate, sees_itself, decision
        self.n_in = self.n_out = gate.shape[1]

    @property
    def heads(self) -> Tensor:
        return torch.arange(self.n_in, device=self.gate.device).expand(self.gate.shape[0], -1)

    @property
    def assign(self) -> Tensor:
        return self.heads.masked_fill(self.gate <= 0.5, -1)

    def shares(self, dtype: torch.dtype) -> Tensor:
        return torch.ones_like(self.gate, dtype=dtype)

    def masked(self, visible: Tensor) -> GateMap:
        return self  # no value of a token gets into another one

    def apply(self, x: Tensor) -> Tensor:
        return x

    def pool(self, mass: Tensor) -> Tensor:
        return mass * (self.gate > 0.5).unsqueeze(-1).to(mass.dtype)

    def collected(self, mass: Tensor) -> Tensor:
        """Sums of a per-token quantity [B, N, D] over what each token took in; all of them stay."""
        return mass

    def sized(self, size: Tensor) -> Tensor:
        """Token sizes behind the map [B, N, 1]; all of them stay."""
        return size

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        # closed tokens come back as dropped ones do, and what comes back carries the gradient of the gate
        gate = self.gate.unsqueeze(-1).to(y.dtype)
        back = gate * y
        return back if dropped is None else back + (1 - gate) * dropped.to(y.dtype)

    def matrix(self) -> Tensor:
        return torch.eye(self.n_in, device=self.gate.device).expand(self.gate.shape[0], -1, -1)
