"""Distances between all tokens of an image, by one product."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import full_precision


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows [B, N, N] float32, no gradient.

    Exactly symmetric, and zero on the diagonal: tokens that are each other's nearest tie, as they do on paper.

    Args:
        x: [B, N, C].
    """
    x = x.detach().float()
    x = x - x.mean(1, keepdim=True)  # what all tokens have in common would cancel to noise
    with full_precision(x):
        norm = x.square().sum(-1)
        found = torch.baddbmm(norm.unsqueeze(1), x, x.transpose(1, 2), alpha=-2) + norm.unsqueeze(2)
        found = (found + found.transpose(1, 2)).clamp(min=0) / 2
    same = torch.arange(x.shape[1], device=x.device)
    return found.masked_fill(same.unsqueeze(1) == same, 0)
