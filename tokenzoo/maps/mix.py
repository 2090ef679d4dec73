"""Dense soft maps."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenMap


class MixMap(TokenMap):
    """A dense soft map (slimming modules, token transforming, spreading cluster centres back).

    Mass is shared out along the columns of |W|, so that it is conserved; the way back mixes the new tokens by the same
    shares.

    Args:
        weight: W [B, N', N].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.n_out, self.n_in = weight.shape[1:]

    @property
    def heads(self) -> Tensor:
        return self.weight.abs().argmax(dim=2)

    @property
    def assign(self) -> Tensor:
        return self.weight.abs().argmax(dim=1)

    def apply(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weight.to(x.dtype), x)

    def means(self, x: Tensor) -> Tensor:
        return self.apply(x)  # learned weights have signs and a scale of their own

    def membership(self) -> Tensor:
        share = self.weight.abs()
        return share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)

    def pool(self, mass: Tensor) -> Tensor:
        return torch.bmm(self.membership().to(mass.dtype), mass)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        return torch.bmm(self.membership().transpose(1, 2).to(y.dtype), y)

    def matrix(self) -> Tensor:
        return self.weight
