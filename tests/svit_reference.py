"""Slow, obvious SViT for tests: maps in NCHW, unfold and fold as convolutions with identity kernels, plain softmax.

Parameters have the names of `tokenzoo.models.SViT`, so that weights go from one to the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Depthwise(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.conv, self.fc2 = nn.Conv2d(dim, hidden, 1), Depthwise(hidden), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.conv(F.gelu(self.fc1(x))))


class PlainAttention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (self.heads, -1)).chunk(3, dim=2)  # [B, H, D, N]
        probs = (q.transpose(2, 3) @ k * q.shape[2] ** -0.5).softmax(dim=-1)
        return self.proj((probs @ v.transpose(2, 3)).transpose(2, 3).reshape(x.shape))


class Kernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.eye(9).reshape(9, 1, 3, 3), requires_grad=False)


class UnfoldFoldAttention(nn.Module):
    def __init__(self, dim: int, cell: tuple[int, int], heads: int, n_iter: int = 1, qkv_bias: bool = True):
        super().__init__()
        self.cell, self.n_iter = cell, n_iter
        self.stoken_refine = PlainAttention(dim, heads, qkv_bias)
        self.unfold, self.fold = Kernels(), Kernels()

    def around(self, supers: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, h * w, C, 9]."""
        batch, channels, high, wide = supers.shape
        slots = F.conv2d(supers.reshape(-1, 1, high, wide), self.unfold.weights, padding=1)
        return slots.reshape(batch, channels * 9, -1).transpose(1, 2).unflatten(2, (channels, 9))

    def back(self, sent: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h * w, C, 9] -> [B, C, h, w]."""
        batch, _, channels, _ = sent.shape
        slots = sent.permute(0, 2, 3, 1).reshape(batch * channels, 9, *grid)
        return F.conv_transpose2d(slots, self.fold.weights, padding=1).reshape(batch, channels, *grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.cell == (1, 1):
            return self.stoken_refine(x)
        (high, wide), (h, w) = x.shape[2:], self.cell
        x = F.pad(x, (0, -wide % w, 0, -high % h))
        grid = x.shape[2] // h, x.shape[3] // w
        supers = F.adaptive_avg_pool2d(x, grid)
        cells = x.unflatten(3, (grid[1], w)).unflatten(2, (grid[0], h)).permute(0, 2, 4, 3, 5, 1)
        cells = cells.reshape(x.shape[0], grid[0] * grid[1], h * w, -1)  # [B, M, T, C]
        with torch.no_grad():
            for step in range(self.n_iter):
                weights = (cells @ self.around(supers) * x.shape[1] ** -0.5).softmax(dim=-1)  # [B, M, T, 9]
                mass = self.back(weights.sum(dim=2).unsqueeze(2), grid) + 1e-12
                if step + 1 < self.n_iter:
                    supers = self.back(cells.transpose(2, 3) @ weights, grid) / mass
        supers = self.stoken_refine(self.back(cells.transpose(2, 3) @ weights, grid) / mass)
        out = (self.around(supers) @ weights.transpose(2, 3)).transpose(2, 3)  # [B, M, T, C]
        out = out.reshape(-1, *grid, h, w, x.shape[1]).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(x.shape)[:, :, :high, :wide]


class Block(nn.Module):
    def __init__(self, dim: int, cell: int, heads: int, scaled: bool):
        super().__init__()
        self.pos_embed, self.norm1 = Depthwise(dim), ChannelNorm(dim)
        self.attn = UnfoldFoldAttention(dim, (cell, cell), heads)
        self.norm2, self.mlp2 = nn.BatchNorm2d(dim), Mlp(dim, 4 * dim)
        self.gamma_1 = nn.Parameter(torch.empty(1, dim, 1, 1)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.empty(1, dim, 1, 1)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self.attn(self.norm1(x)) * (1 if self.gamma_1 is None else self.gamma_1)
        return x + self.mlp2(self.norm2(x)) * (1 if self.gamma_2 is None else self.gamma_2)


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], dim: int, following: int | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity()
        if following is not None:
            self.downsample = nn.Module()
            self.downsample.proj = nn.Sequential(nn.Conv2d(dim, following, 3, 2, 1), nn.BatchNorm2d(following))
            self.downsample.forward = self.downsample.proj.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class ReferenceSViT(nn.Module):
    """SViT-S by default."""

    def __init__(
        self, embed_dim=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8), stoken_size=(8, 4, 1, 1),
        layerscale=(False, False, False, False), projection=1024, num_classes=1000,
    ):  # fmt: skip
        super().__init__()
        first = embed_dim[0]
        self.patch_embed = nn.Module()
        steps = ((3, first // 2, 2), (first // 2, first // 2, 1), (first // 2, first, 2), (first, first, 1))
        parts = [(nn.Conv2d(i, o, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(o)) for i, o, stride in steps]
        self.patch_embed.proj = nn.Sequential(*(layer for part in parts for layer in part))
        rows = zip(embed_dim, depths, num_heads, stoken_size, layerscale, (*embed_dim[1:], None))
        self.layers = nn.Sequential(*(
            Stage([Block(dim, cell, heads, scaled) for _ in range(depth)], dim, following)
            for dim, depth, heads, cell, scaled, following in rows
        ))  # fmt: skip
        self.proj, self.norm = nn.Conv2d(embed_dim[-1], projection, 1), nn.BatchNorm2d(projection)
        self.head = nn.Linear(projection, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.patch_embed.proj(x))
        return self.head(F.silu(self.norm(self.proj(x))).mean(dim=(2, 3)))
