"""Layers that make a fixed number of tokens out of all, with the names of their released weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.rows import softmax_over
from ..ops.sinkhorn import sinkhorn


class MergingQueries(nn.Module):
    """Learned queries that attend to all tokens; what they read is normed.

    Args:
        dim: channels of the tokens.
        keep: queries, K.
        scaled: divide logits by the root of `dim`.

    Source: Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022.
    """

    def __init__(self, dim: int, keep: int, scaled: bool = False) -> None:
        super().__init__()
        self.scale = dim**-0.5 if scaled else 1.0
        self.norm = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(keep, dim))

    def forward(self, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [B, K, N], rows of which sum to one, and new tokens [B, K, C].

        Args:
            x: tokens [B, N, C].
            counts: tokens that count [B, N] bool, None for all.
        """
        x = self.norm(x)
        weights = softmax_over(self.queries @ x.transpose(1, 2) * self.scale, counts)
        return weights, weights.to(x.dtype) @ x


class SinkhornCentres(nn.Module):
    """Learned centres among which an optimal transport plan shares the directions of all tokens out.

    Args:
        dim: channels of the tokens.
        keep: centres, K.
        eps: how soft the plan is.
        iterations: of Sinkhorn's algorithm.

    Source: Haurum et al., "Which Tokens to Use?", ICCV Workshops 2023, which brings centres to unit length in place in
    every pass; here they are used at unit length, and keep theirs.
    """

    def __init__(self, dim: int, keep: int, eps: float = 1.0, iterations: int = 3) -> None:
        super().__init__()
        self.eps, self.iterations = eps, iterations
        self.v = nn.Parameter(torch.randn(keep, dim))

    def forward(self, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [B, K, N], columns of which sum to one, and new tokens [B, K, C]: sums of unit vectors.

        Args:
            x: tokens [B, N, C].
            counts: tokens that count [B, N] bool, None for all.
        """
        unit = F.normalize(x, dim=2)
        alike = F.normalize(self.v, dim=1) @ unit.transpose(1, 2)
        weights = sinkhorn(alike.to(torch.promote_types(x.dtype, torch.float32)) / self.eps, self.iterations, counts)
        return weights, weights.to(x.dtype) @ unit
