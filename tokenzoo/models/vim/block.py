"""A block of Vision Mamba, in parts that can be called one by one.

Source: Zhu, Liao, Zhang, Wang, Liu, Wang, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model", ICML 2024.
"""

from __future__ import annotations

import torch
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from .._scan_signals import ScanSignals
from .mixer import Stretch


@register_notrace_module
class VimBlock(nn.Module):
    """Residual addition, norm and mixer.

    Args:
        norm: norm of the stream.
        mixer: mixer of the normed tokens.
        drop_path: stochastic depth of the previous mixer's output.
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: nn.Module):
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = drop_path

    def add(self, h: Tensor, res: Tensor | None = None) -> Tensor:
        """The stream [B, L, C] in front of the mixer, at least float32.

        Args:
            h: output of the previous mixer, or the embedded tokens [B, L, C].
            res: the stream that `h` belongs to [B, L, C], None in the first block.
        """
        return add_residual(h if res is None else self.drop_path(h), res)

    def mix(self, res: Tensor, stretch: Stretch | None = None, signals: ScanSignals | None = None) -> Tensor:
        """The mixer's output [B, L, C] for a stream [B, L, C]; see `VimMixer.forward`."""
        return self.mixer(self.norm(res), stretch, signals)

    def forward(self, h: Tensor, res: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(output of the mixer, the stream in front of it), [B, L, C] each, from those of the block before."""
        res = self.add(h, res)
        return self.mix(res), res


@register_notrace_function
def add_residual(h: Tensor, res: Tensor | None) -> Tensor:
    """`h` plus the residual stream, at least in float32."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    return wide if res is None else res + wide
