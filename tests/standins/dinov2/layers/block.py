"""Blocks of the stand-in."""

import torch
from torch import nn

from .attention import Attention


class LayerScale(nn.Module):
    def __init__(self, dim, init_values):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, num_heads, init_values=1.0, attn_class=Attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn_class(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ls1, self.ls2 = LayerScale(dim, init_values), LayerScale(dim, init_values)
        self.drop_path1, self.drop_path2, self.sample_drop_ratio = nn.Identity(), nn.Identity(), 0.0

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class NestedTensorBlock(Block):
    """Takes lists of crops besides."""

    def forward(self, x_or_x_list):
        if isinstance(x_or_x_list, list):
            return [super(NestedTensorBlock, self).forward(x) for x in x_or_x_list]
        return super().forward(x_or_x_list)
