"""Scores of patches against a policy token, over several heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Interpreter(nn.Module):
    """Multi-head interpreter: the mean over heads of the sigmoid of how alike a patch and a policy token are.

    I_j = 1/H sum_h sigmoid(q_h(policy) . k_h(x_j) + b_h). The queries begin near zero and the biases at 2, so that a
    new one scores all patches around 0.88 and lets them pass; norm, scale and beginning are ours.

    Args:
        dim: channels.
        heads: heads, a divisor of the channels.
        start: what the biases begin at.

    Source: Pan, Panda, Jiang, Wang, Feris, Oliva, "IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision
    Transformers", NeurIPS 2021 (no code was released).
    """

    def __init__(self, dim: int, heads: int, start: float = 2.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.policy = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.full((heads,), start))
        nn.init.normal_(self.q.weight, std=0.02)
        nn.init.zeros_(self.q.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [B, M, C] -> scores in (0, 1) [B, M], float32."""
        q = self.q(self.policy).unflatten(-1, (self.heads, -1)).float()  # [H, D]
        k = self.k(self.norm(x)).unflatten(-1, (self.heads, -1)).float()  # [B, M, H, D]
        return ((k * q).sum(-1) * self.scale + self.bias.float()).sigmoid().mean(-1)
