"""DynamicViT's predictor of which patches to keep, with the names of its released weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenPredictor(nn.Module):
    """Log-probabilities of keeping and of dropping every patch, from itself and from the mean of those that are left.

    Args:
        dim: channels of the patches, a multiple of 4.

    Raises:
        ValueError: channels that cannot be halved twice.

    Source: Rao et al., "DynamicViT", NeurIPS 2021.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"TokenPredictor: dim={dim} cannot be halved twice; use a model whose width is 4 * k")
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, left: Tensor) -> Tensor:
        """Scores [B, M, 2], keeping first.

        Args:
            x: patches [B, M, C].
            left: what is left of each [B, M, 1], 1 or 0.
        """
        local, whole = self.in_conv(x).chunk(2, dim=2)
        # as published but for the bound: an image of which nothing is left has a mean of 0 there, not NaN
        whole = (whole * left).sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1e-6)
        return self.out_conv(torch.cat([local, whole.expand_as(local)], dim=2))
