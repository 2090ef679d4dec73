"""Token-aware average pooling: every token reads a mixture of means over its neighbourhood, as it chooses itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.rows import split_dim


class DilationPredictor(nn.Module):
    """How much of every scale a token reads.

    Args:
        dim: channels.
        num_scales: scales, K.
    """

    def __init__(self, dim: int, num_scales: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] -> shares [B, K, H, W] that sum to one over the scales."""
        return self.proj(x).softmax(dim=1)


class TokenAveragePooling(nn.Module):
    """Patches as mixtures of means over 3 x 3 neighbours at growing distances; prefix tokens stay as they are.

    Scale 0 is the token itself, scale i the mean over its neighbours i patches apart, where zeros stand beyond the
    border. Stands in front of the norm of an attention branch, the residual stream beside it. In a model with prefix
    tokens (ours) only patches are pooled. One scale changes nothing, and its predictor learns nothing.

    Args:
        dim: channels.
        num_scales: scales, the token itself among them.

    Raises:
        ValueError: no scale.

    Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
    """

    def __init__(self, dim: int, num_scales: int = 4) -> None:
        super().__init__()
        if type(num_scales) is not int or num_scales < 1:
            raise ValueError(f"TokenAveragePooling: num_scales={num_scales!r}; give a whole number, 1 changes nothing")
        self.num_scales = num_scales
        self.dilation_predictor = DilationPredictor(dim, num_scales)

    def scales(self, x: Tensor) -> list[Tensor]:
        """The scales of a map [B, C, H, W]."""
        kernel = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        means = [F.conv2d(x, kernel, padding=i, dilation=i, groups=x.shape[1]) for i in range(1, self.num_scales)]
        return [x, *means]

    def shares(self, x: Tensor, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
        """How much every patch takes of every scale [B, K, H, W]; arguments as for `forward`."""
        high, wide = grid
        if x.shape[1] != num_prefix + high * wide:
            raise ValueError(
                f"TokenAveragePooling: {x.shape[1]} tokens for {num_prefix} prefix tokens and {high} x {wide} patches; "
                "give all patches in their places"
            )
        return self.dilation_predictor(_as_map(x, grid, num_prefix))

    def mix(self, x: Tensor, shares: Tensor, num_prefix: int = 0) -> Tensor:
        """Tokens [B, N, C] pooled by given shares [B, K, H, W]."""
        patches = _as_map(x, shares.shape[2:], num_prefix)
        pooled = sum(share.unsqueeze(1) * each for share, each in zip(shares.unbind(1), self.scales(patches)))
        return torch.cat([x[:, :num_prefix], pooled.flatten(2).transpose(1, 2).to(x.dtype)], dim=1)

    def forward(self, x: Tensor, grid: tuple[int, int], num_prefix: int = 0) -> Tensor:
        """Pooled tokens [B, N, C].

        Args:
            x: tokens [B, N, C], prefix first, patches in raster order.
            grid: patches (down, right).
            num_prefix: prefix tokens.

        Raises:
            ValueError: tokens that are not all patches of the grid.
        """
        shares = self.shares(x, grid, num_prefix)
        return x if self.num_scales == 1 else self.mix(x, shares, num_prefix)


def _as_map(x: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Patches as a map [B, C, H, W]."""
    return split_dim(x[:, num_prefix:].transpose(1, 2), 2, *grid)
