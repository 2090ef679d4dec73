"""A learned number of tokens: a distribution over candidates, and the straight-through mask that its mean makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedCount(nn.Module):
    """How many patches stay, as the mean of candidate counts under learned probabilities.

    Keys are those of the released code.

    Args:
        patches: patches that there are.
        granularity: distance between candidates: patches, patches - granularity, ... above 0.

    Source: Chen, Shao, Xu, et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV
    2023, and the repository OpenGVLab/DiffRate.
    """

    def __init__(self, patches: int, granularity: int = 1) -> None:
        super().__init__()
        self.patches = patches
        candidates = torch.arange(patches, 0, -granularity, dtype=torch.float32)
        self.register_buffer("kept_token_candidate", candidates)
        self.selected_probability = nn.Parameter(torch.zeros(len(candidates)))

    def kept(self) -> Tensor:
        """Patches that stay: the mean, rounded up, with the gradient of the mean; a scalar."""
        mean = (self.kept_token_candidate * self.selected_probability.softmax(0)).sum()
        # the mean of equal candidates may come out a rounding error above them
        return mean + ((mean - 1e-4).ceil() - mean).detach()

    def survival(self) -> Tensor:
        """Probability that the patch of every rank stays [patches]."""
        rank = torch.arange(self.patches, device=self.kept_token_candidate.device)
        covers = rank.unsqueeze(1) < self.kept_token_candidate  # [patches, candidates]
        return (covers * self.selected_probability.softmax(0)).sum(1)

    def mask(self, current: int) -> Tensor:
        """1 for ranks that stay and 0 for others, with the gradient of `survival` [patches].

        Args:
            current: patches that are left so far; ranks behind them are gone by an earlier mask, and stay 1 in this.
        """
        rank, soft = torch.arange(self.patches, device=self.kept_token_candidate.device), self.survival()
        hard = ((rank < self.kept().detach()) | (rank >= current)).to(soft.dtype)
        return soft + (hard - soft).detach()
