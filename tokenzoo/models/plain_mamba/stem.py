"""The convolutional stem of PlainMamba: from an image to a grid of tokens.

Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from ...ops.layer_macs import conv_macs
from .._embed import MapEmbed


class PlainMambaStem(MapEmbed):
    """A 7 x 7 convolution that halves the image, 3 x 3 convolutions, and a projection of what is left of each patch.

    Images of any size pass: where the halved map is not a whole number of patches, zeros are added to it on the right
    and at the bottom.

    Args:
        img_size: image size in pixels, one number or (high, wide).
        patch_size: pixels per token, even, likewise.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
        convs: 3 x 3 convolutions.
        hidden: channels of the convolutions.

    Raises:
        ValueError: an odd `patch_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        convs: int = 1,
        hidden: int = 64,
    ):
        if any(side % 2 for side in to_2tuple(patch_size)):
            raise ValueError(f"PlainMamba: the stem halves patches, patch_size={patch_size} is odd; give an even one")
        super().__init__(img_size, patch_size, strict_img_size=False, dynamic_img_pad=True)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(True)
        )
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers += [nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(True)]
        self.convs = nn.Sequential(*layers)
        half = self.patch_size[0] // 2, self.patch_size[1] // 2
        self.projection = nn.Conv2d(hidden, embed_dim, half, stride=half)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of one image with a grid of tokens (high, wide); norms are free."""
        pixels = self.patch_size[0] * self.patch_size[1] // 4
        convs = (self.stem[0], *self.convs[::3])
        return grid[0] * grid[1] * (pixels * sum(map(conv_macs, convs)) + conv_macs(self.projection))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> tokens in raster order [B, N, D].

        Raises:
            ValueError: other channels, or no image at all.
        """
        channels = self.stem[0].in_channels
        if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"PlainMamba: {tuple(x.shape)} are no images [B, {channels}, H, W] of at least one pixel")
        x = self.convs(self.stem(x))
        high, wide = self.projection.kernel_size
        below, beside = -x.shape[2] % high, -x.shape[3] % wide
        if below or beside:
            x = F.pad(x, (0, beside, 0, below))
        return self.projection(x).flatten(2).transpose(1, 2)
