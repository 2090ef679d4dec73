"""Dense soft maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import TokenMap


class MixMap(TokenMap):
    """A dense soft map (slimming modules, token transforming, spreading cluster centres back).

    Mass is shared out along the columns of |W|, so that it is conserved; the way back mixes the new tokens by the same
    shares.

    Args:
        weight: W [B, N', N], of the tokens behind the prefix.
        num_prefix: tokens in front that stay as they are.
        knows_mask: weights of hidden tokens and of padding are 0 already wherever others count.
        decision: what a learned method notes about this.
    """

    def __init__(
        self, weight: Tensor, num_prefix: int = 0, knows_mask: bool = False, decision: object | None = None
    ) -> None:
        self.weight, self.num_prefix, self.knows_mask, self.decision = weight, num_prefix, knows_mask, decision
        self.n_out, self.n_in = (num_prefix + side for side in weight.shape[1:])

    @property
    def heads(self) -> Tensor:
        return self._with_prefix_index(self.weight.abs().argmax(dim=2))

    @property
    def assign(self) -> Tensor:
        return self._with_prefix_index(self.weight.abs().argmax(dim=1))

    def masked(self, visible: Tensor) -> TokenMap:
        return self if self.knows_mask else super().masked(visible)

    def apply(self, x: Tensor) -> Tensor:
        return self._behind_prefix(x, self.weight)

    def means(self, x: Tensor) -> Tensor:
        return self.apply(x)  # learned weights have signs and a scale of their own

    def membership(self) -> Tensor:
        return self._dense(self._shares())

    def pool(self, mass: Tensor) -> Tensor:
        return self._behind_prefix(mass, self._shares())

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        return self._behind_prefix(y, self._shares().transpose(1, 2))

    def matrix(self) -> Tensor:
        return self._dense(self.weight)

    def _shares(self) -> Tensor:
        share = self.weight.abs()
        return share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)

    def _behind_prefix(self, x: Tensor, weight: Tensor) -> Tensor:
        mixed = torch.bmm(weight.to(x.dtype), x[:, self.num_prefix :])
        return torch.cat([x[:, : self.num_prefix], mixed], dim=1) if self.num_prefix else mixed

    def _with_prefix_index(self, index: Tensor) -> Tensor:
        front = torch.arange(self.num_prefix, device=index.device).expand(index.shape[0], -1)
        return torch.cat([front, index + self.num_prefix], dim=1) if self.num_prefix else index

    def _dense(self, weight: Tensor) -> Tensor:
        if not self.num_prefix:
            return weight
        front = torch.eye(self.num_prefix, dtype=weight.dtype, device=weight.device).expand(weight.shape[0], -1, -1)
        front = F.pad(front, (0, weight.shape[2]))
        return torch.cat([front, F.pad(weight, (self.num_prefix, 0))], dim=1)
