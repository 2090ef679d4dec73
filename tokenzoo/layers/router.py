"""Weights of tokens that decide which of them run through a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TanhRouter(nn.Module):
    """Weights around 1: 0.2 tanh of a linear layer, which begins at zero.

    Args:
        dim: channels.
        scale: how far from 1 weights can be.

    Source: Zhang, Meng, Lu et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025,
    and the repository MCG-NJU/p-MoD.
    """

    def __init__(self, dim: int, scale: float = 0.2) -> None:
        super().__init__()
        self.scale, self.router = scale, nn.Linear(dim, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, M, C] -> weights [B, M], float32 at least."""
        found = self.router(x).squeeze(-1)
        return self.scale * found.to(torch.promote_types(found.dtype, torch.float32)).tanh() + 1
