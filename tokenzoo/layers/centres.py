"""Shared centres that tokens are grouped by, and attention to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Centres(nn.Module):
    """Centres of one block, with keys and values of their own.

    Centres begin as random directions and are parameters; the values begin at zero, so that a new layer adds nothing.

    Args:
        dim: channels.
        width: of all keys together.
        value_width: of all values together.
        count: centres.

    Source: ours, after Liu, Liu, Tang, Wu, "CATANet", CVPR 2025, where centres are a moving average.
    """

    def __init__(self, dim: int, width: int, value_width: int, count: int) -> None:
        super().__init__()
        self.means = nn.Parameter(F.normalize(torch.randn(count, dim), dim=-1))
        self.to_k = nn.Linear(dim, width, bias=False)
        self.to_v = nn.Linear(dim, value_width, bias=False)
        nn.init.zeros_(self.to_v.weight)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The centre of every token [B, M], by the largest cosine, and that cosine, with gradient to the centres."""
        means = F.normalize(self.means.float(), dim=-1)
        cosine = F.normalize(x.float(), dim=-1) @ means.transpose(0, 1)
        found = cosine.max(dim=-1)
        return found.indices, found.values
