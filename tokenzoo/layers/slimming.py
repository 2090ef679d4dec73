"""SiT's two layers, with the names of their released weights: one slims tokens, one rebuilds them for a teacher.

Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.rows import softmax_over


class TokenSlimming(nn.Module):
    """Weights by which every new token mixes all old ones, read off these.

    Args:
        dim: channels of the tokens.
        keep: new tokens, K.
        ratio: hidden channels over `dim`.
    """

    def __init__(self, dim: int, keep: int, ratio: float = 0.5) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, keep))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        _start(self)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Weights [B, K, N] in float32 at least; rows sum to one.

        Args:
            x: tokens [B, N, C].
            counts: tokens that count [B, N] bool, None for all.
        """
        return softmax_over((self.weight(x) * self.scale).transpose(1, 2), counts)


class ReverseSlimming(nn.Module):
    """Rebuilds all tokens from a few; needed in training alone.

    Args:
        dim: channels of the tokens.
        keep: tokens that come in.
        recovered: tokens that go out.
        ratio: hidden width of both MLPs over what they give.
    """

    def __init__(self, dim: int, keep: int, recovered: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.recovered = recovered
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp1 = _Mlp(keep, int(recovered * ratio), recovered)
        self.mlp2 = _Mlp(dim, int(dim * ratio), dim)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, keep, C] -> [B, recovered, C]."""
        y = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return y + self.mlp2(self.norm2(y))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _start(layer: nn.Module) -> None:
    """The published start of the linear layers."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
