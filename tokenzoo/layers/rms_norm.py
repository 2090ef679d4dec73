"""Root-mean-square norm as the official Mamba backbones compute it."""

from __future__ import annotations

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, in float32, and scale.

    Args:
        dim: Width C of the tokens.
        eps: Added to the mean square.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normed tokens [..., C] in the dtype of x [..., C]."""
        if x.shape[-1] != self.weight.shape[0]:
            raise ValueError(
                f"RMSNorm: x {tuple(x.shape)} ends in {x.shape[-1]} channels; this norm was built for dim="
                f"{self.weight.shape[0]}"
            )
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
