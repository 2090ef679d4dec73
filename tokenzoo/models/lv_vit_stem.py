"""Patch embeddings of LV-ViT: one convolution, or a small convolutional stem in front of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layer_macs import conv_macs
from ._embed import MapEmbed
from ._place import made_on


class PatchProjection(MapEmbed):
    """Patches through one convolution (`proj`), behind the stem of a subclass.

    Args:
        img_size: image size in pixels.
        patch_size: pixels per token.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
        bias: bias of the projection.
        device: where parameters lie.
        dtype: their number format.
        size_options: `strict_img_size`, `dynamic_img_pad`, `output_fmt`, `flatten` of the base class.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **size_options: Any,
    ):
        super().__init__(img_size, patch_size, **size_options)
        with made_on(device):
            self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)
        self.to(dtype=dtype)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of one image with a grid of tokens (high, wide)."""
        return grid[0] * grid[1] * conv_macs(self.proj)

    def embed_map(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> [B, h, w, D]."""
        return self.proj(x).permute(0, 2, 3, 1)


class ConvStem(MapEmbed):
    """Three convolutions at half the resolution, then patches.

    Args:
        img_size: image size in pixels.
        patch_size: pixels per token, even.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
        stem_dim: channels of the three convolutions.
        bias: bias of the projection.
        device: where parameters lie.
        dtype: their number format.
        size_options: `strict_img_size`, `dynamic_img_pad`, `output_fmt`, `flatten` of the base class.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        stem_dim: int = 64,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **size_options: Any,
    ):
        super().__init__(img_size, patch_size, **size_options)
        half = (self.patch_size[0] // 2, self.patch_size[1] // 2)
        with made_on(device):
            self.conv1 = nn.Conv2d(in_chans, stem_dim, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem_dim)
            self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(stem_dim)
            self.conv3 = nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(stem_dim)
            self.proj = nn.Conv2d(stem_dim, embed_dim, half, stride=half, bias=bias)
        self.to(dtype=dtype)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of one image with a grid of tokens (high, wide); norms are free."""
        stem = sum(map(conv_macs, (self.conv1, self.conv2, self.conv3)))
        positions = self.patch_size[0] * self.patch_size[1] // 4  # of the stem's maps, a token
        return grid[0] * grid[1] * (positions * stem + conv_macs(self.proj))

    def embed_map(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> [B, h, w, D]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).permute(0, 2, 3, 1)


# names of the stems in the released code
STEMS: dict[str, Any] = {
    "naive": PatchProjection,
    "4_2": ConvStem,
    "4_2_128": partial(ConvStem, stem_dim=128),
}
