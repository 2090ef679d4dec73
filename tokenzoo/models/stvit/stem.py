"""The convolutional stem of STViT-R."""

from __future__ import annotations

from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride two, each with BatchNorm and Hardswish, to a quarter of the resolution.

    Args:
        in_chans: channels of the image.
        dim: channels of the first stage; half of them between the convolutions.
        img_size: image size in pixels, one number or (high, wide).
        norm_layer: norm of the tokens; None for none.
    """

    def __init__(self, in_chans: int, dim: int, img_size: int | tuple[int, int] = 224, norm_layer: Any = None):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        layers: list[nn.Module] = []
        for wide, out in ((in_chans, dim // 2), (dim // 2, dim)):
            layers += [nn.Conv2d(wide, out, 3, 2, padding=1, bias=False), nn.BatchNorm2d(out), nn.Hardswish()]
        self.proj = nn.Sequential(*layers)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Notes another image size in pixels, one number or (high, wide)."""
        self.img_size = to_2tuple(img_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Tokens (high, wide) of the first stage at `img_size`."""
        return self.dynamic_feat_size(self.img_size)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (high, wide) of the first stage for an image size."""
        return -(-img_size[0] // 4), -(-img_size[1] // 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> map of tokens [B, H / 4, W / 4, D]."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))
