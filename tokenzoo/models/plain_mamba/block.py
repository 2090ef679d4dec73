"""A block of PlainMamba.

Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from .._scan_signals import ScanSignals
from .mixer import PlainMambaMixer, Stretch, on_grid


@register_notrace_module
class PlainMambaBlock(nn.Module):
    """A mixer with its norm on a residual path; in some blocks a depthwise convolution of the whole stream follows.

    Args:
        dim: channels C.
        drop_path: stochastic depth.
        depthwise: have that convolution, 3 x 3 with BatchNorm and GELU, without a residual path.
        mixer: options of `PlainMambaMixer`.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, depthwise: bool = False, **mixer: Any):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mamba = PlainMambaMixer(dim, **mixer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.dw = None
        if depthwise:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(dim), nn.GELU())

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        kept: Tensor | None = None,
        stretch: Stretch | None = None,
        signals: ScanSignals | None = None,
    ) -> Tensor:
        """Tokens in raster order [B, K, C] -> [B, K, C]; arguments as those of `PlainMambaMixer.forward`."""
        x = x + self.drop_path(self.mamba(self.norm(x), grid, kept, stretch, signals))
        return x if self.dw is None else on_grid(self.dw, x, grid, kept)
