"""CATANet's network for super-resolution: token aggregation and attention in overlapping windows by turns.

It maps images to larger images and has no classes, so timm does not know it. Parameters are named as in the released
code.

Source: Liu, Liu, Tang, Wu, "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image
Super-Resolution", CVPR 2025, and the repository EquationWalker/CATANet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.token_aggregation import ConvMlpBranch, Queries, TokenAggregation
from ..ops.overlapping import cut_windows, join_windows


class _WindowAttention(Queries):
    """Attention among the tokens of a window."""

    def __init__(self, dim: int, qk_dim: int, heads: int) -> None:
        super().__init__(dim, qk_dim)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:  # [windows, N, C]
        q, k, v = (t(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.to_q, self.to_k, self.to_v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Normed(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn


class OverlappingWindows(nn.Module):
    """Attention in windows that share two rows and columns with their neighbours, then an MLP with a convolution.

    Args:
        dim: channels.
        qk_dim: width of queries and keys of all heads.
        hidden: width inside the MLP.
        heads: heads.
        size: side of a window; on a smaller map the window is the map.
    """

    def __init__(self, dim: int, qk_dim: int, hidden: int, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.layer = nn.ModuleList([_Normed(dim, _WindowAttention(dim, qk_dim, heads)), ConvMlpBranch(dim, hidden)])

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        size = (min(self.size, grid[0]), min(self.size, grid[1]))
        step = (max(1, size[0] - 2), max(1, size[1] - 2))
        windows = cut_windows(x, size, step)
        rows = windows.permute(0, 2, 3, 4, 5, 1)  # [B, rows, columns, h, w, C]
        shape, tokens = rows.shape, rows.flatten(3, 4).flatten(0, 2)
        attention, mlp = self.layer
        tokens = tokens + attention.fn(attention.norm(tokens))
        x = join_windows(tokens.reshape(shape).permute(0, 5, 1, 2, 3, 4), grid, step)
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + mlp.fn(mlp.norm(rows), grid)
        return rows.transpose(1, 2).unflatten(2, grid)


class CATANetSR(nn.Module):
    """Images [B, 3, H, W] -> images [B, 3, upscale * H, upscale * W].

    A place that several windows hold is their mean.

    Args:
        upscale: 2, 3 or 4.
        dim: channels.
        qk_dim: width of queries and keys of all heads.
        mlp_dim: width inside the MLPs.
        heads: heads.
        patch_size: side of the windows, one number per block; they say how many blocks there are.
        num_tokens: shared centres, one number per block.
        group_size: tokens per group, likewise.
        n_iters: steps of the centres in training, likewise.

    Raises:
        ValueError: another `upscale`, settings for unlike numbers of blocks, or windows below 3.
    """

    def __init__(
        self, upscale: int = 2, dim: int = 40, qk_dim: int = 36, mlp_dim: int = 96, heads: int = 4,
        patch_size: Sequence[int] = (16, 20, 24, 28) * 2, num_tokens: Sequence[int] = (16, 32, 64, 128) * 2,
        group_size: Sequence[int] = (256, 128, 64, 32) * 2, n_iters: Sequence[int] = (5,) * 8,
    ) -> None:  # fmt: skip
        super().__init__()
        if upscale not in (2, 3, 4):
            raise ValueError(f"CATANetSR: upscale={upscale!r} has no upsampler; give 2, 3 or 4")
        lengths = [len(each) for each in (patch_size, num_tokens, group_size, n_iters)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"CATANetSR: patch_size, num_tokens, group_size and n_iters are for {lengths} blocks; give each one "
                "number per block"
            )
        if min(patch_size, default=3) < 3:
            raise ValueError(f"CATANetSR: windows of {min(patch_size)} only overlap; give sides of 3 or more")
        if dim % heads or qk_dim % heads:
            raise ValueError(
                f"CATANetSR: dim={dim} and qk_dim={qk_dim} do not split into {heads} heads; choose multiples"
            )
        self.upscale = upscale
        self.first_conv = nn.Conv2d(3, dim, 3, padding=1)
        self.blocks, self.mid_convs = nn.ModuleList(), nn.ModuleList()
        for size, centres, group, rounds in zip(patch_size, num_tokens, group_size, n_iters, strict=True):
            aggregation = TokenAggregation(dim, qk_dim, mlp_dim, heads, centres, group, rounds)
            local = OverlappingWindows(dim, qk_dim, mlp_dim, heads, size)
            self.blocks.append(nn.ModuleList([aggregation, local]))
            self.mid_convs.append(nn.Conv2d(dim, dim, 3, padding=1))
        if upscale == 4:
            self.upconv1 = nn.Conv2d(dim, 4 * dim, 3, padding=1)
            self.upconv2 = nn.Conv2d(dim, 4 * dim, 3, padding=1)
        else:
            self.upconv = nn.Conv2d(dim, upscale**2 * dim, 3, padding=1)
        self.last_conv = nn.Conv2d(dim, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Larger images.

        Args:
            x: images [B, 3, H, W].

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"CATANetSR: an input of {tuple(x.shape)} is no batch of images; give [B, 3, H, W]")
        base = F.interpolate(x, scale_factor=self.upscale, mode="bilinear", align_corners=False)
        first = x = self.first_conv(x)
        for (aggregation, local), conv in zip(self.blocks, self.mid_convs, strict=True):
            x = x + conv(local(aggregation(x)))
        x = x + first
        for conv in (self.upconv1, self.upconv2) if self.upscale == 4 else (self.upconv,):
            factor = 2 if self.upscale == 4 else self.upscale
            x = F.leaky_relu(F.pixel_shuffle(conv(x), factor), 0.1)
        return self.last_conv(x) + base
