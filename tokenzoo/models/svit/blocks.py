"""Parts of the super token backbone: convolutional stem, block, stage."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.chunks import by_images
from ...layers.pointwise import PointwiseConv
from ...layers.super_token import SuperTokenAttention


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map [B, C, H, W]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualDepthwise(nn.Module):
    """Depthwise 3 x 3 convolution and its input, added up in place."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).add_(x)


@register_notrace_module  # the size of a batch decides
class ConvFfn(nn.Module):
    """Two 1 x 1 convolutions with a depthwise one between them."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.hidden = hidden
        self.fc1 = PointwiseConv(dim, hidden)
        self.act = nn.GELU()
        self.conv = ResidualDepthwise(hidden)
        self.fc2 = PointwiseConv(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._run(x)
        return by_images(self._run, x, x.shape[2] * x.shape[3] * self.hidden, self.training)

    def _run(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.conv(self.act(self.fc1(x)))))


class SuperTokenBlock(nn.Module):
    """Positional convolution, super token attention and convolutional MLP, each added to its input.

    Args:
        dim: channels C.
        num_heads: heads among super tokens.
        stoken_size: side of a cell in tokens; 1 is plain attention.
        n_iter: rounds of the association.
        mlp_ratio: hidden channels of the MLP over C.
        qkv_bias: bias of the attention's first projection.
        drop: dropout after the MLP.
        drop_path: stochastic depth.
        init_values: start of the layer scales `gamma_1`, `gamma_2`; None has none.
        mask_borders: see `SuperTokenAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int,
        n_iter: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        mask_borders: bool = False,
    ):
        super().__init__()
        self.pos_embed = ResidualDepthwise(dim)
        self.norm1 = ChannelNorm(dim)
        self.attn = SuperTokenAttention(
            dim, (stoken_size, stoken_size), num_heads, n_iter, qkv_bias, mask_borders=mask_borders
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = ConvFfn(dim, int(dim * mlp_ratio), drop)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        scaled = init_values is not None
        self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), float(init_values))) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), float(init_values))) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.pos_embed(x)
        x = x + self.drop_path1(_scaled(self.attn(self.norm1(x)), self.gamma_1))
        return x + self.drop_path2(_scaled(self.mlp2(self.norm2(x)), self.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


class Downsample(nn.Module):
    """Halves a map: 3 x 3 convolution of stride two and BatchNorm."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, out_dim, 3, stride=2, padding=1), nn.BatchNorm2d(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@register_notrace_module  # the size of a batch decides
class Stem(nn.Module):
    """Four 3 x 3 convolutions, each with GELU and BatchNorm, to a quarter of the resolution.

    Args:
        in_chans: channels of the image.
        dim: channels of the first stage.
        img_size: image size in pixels that costs are given for, one number or (high, wide); every size runs.
    """

    def __init__(self, in_chans: int, dim: int, img_size: int | tuple[int, int] = 224):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        half = dim // 2
        layers: list[nn.Module] = []
        for wide, out, stride in ((in_chans, half, 2), (half, half, 1), (half, dim, 2), (dim, dim, 1)):
            layers += [nn.Conv2d(wide, out, 3, stride, padding=1), nn.GELU(), nn.BatchNorm2d(out)]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.proj(x)
        return by_images(self.proj, x, x.shape[2] * x.shape[3] * self.proj[0].out_channels // 4, self.training)

    __jit_unused_properties__ = ["grid_size"]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Places (high, wide) of the first stage at `img_size`."""
        return self.dynamic_feat_size(self.img_size)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Places (high, wide) of the first stage for an image size."""
        return halved(halved(img_size))


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """What a 3 x 3 convolution of stride two leaves of a map (high, wide)."""
    return -(-size[0] // 2), -(-size[1] // 2)


class SuperTokenStage(nn.Module):
    """Blocks of one resolution, and the step to the next.

    Args:
        dim: channels C.
        out_dim: channels of the next stage, None after the last one.
        drop_paths: stochastic depth of each block; their number is the depth.
        block_options: options of `SuperTokenBlock`.
    """

    def __init__(self, dim: int, out_dim: int | None, drop_paths: list[float], **block_options: Any):
        super().__init__()
        self.blocks = nn.ModuleList(SuperTokenBlock(dim, drop_path=rate, **block_options) for rate in drop_paths)
        self.downsample = nn.Identity() if out_dim is None else Downsample(dim, out_dim)
        self.is_plain = block_options["stoken_size"] == 1  # its blocks attend among all places
        self.grad_checkpointing = False

    def run_blocks(self, x: Tensor) -> Tensor:
        """The blocks alone: [B, C, H, W] -> [B, C, H, W]."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting() and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.run_blocks(x))


def init_weights(module: nn.Module) -> None:
    """Starting values of one module, as published."""
    if isinstance(module, nn.Linear):  # convolutions keep PyTorch's start, as published
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
