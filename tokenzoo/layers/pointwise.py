"""1 x 1 convolution as one matrix product on maps whose channels lie last in memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv(nn.Conv2d):
    """1 x 1 convolution [B, C, H, W] -> [B, D, H, W] that leaves channels last in memory.

    Args:
        in_channels: C.
        out_channels: D.
        bias: add a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
