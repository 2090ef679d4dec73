"""A ViT of your own, which no library knows, and everything that tokenzoo has to be told about it."""

import torch
import torch.nn.functional as F
from torch import nn

from tokenzoo import register_family
from tokenzoo.adapters import AttentionLayer, BlockShape, Family, Heads, ReducingBlock, ReducingModel


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.q, self.k, self.v, self.out = heads, *(nn.Linear(dim, dim) for _ in range(4))

    def qkv(self, x):  # [B, N, C] -> three times [B, H, N, D]
        return [layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(*self.qkv(x)).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.first, self.attn, self.second = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.first(x))
        return x + self.mlp(self.second(x))


class MyViT(nn.Module):
    def __init__(self, grid=(4, 4), patch=8, dim=32, depth=4, heads=2, num_classes=7):
        super().__init__()
        self.grid, self.patch_embed = grid, nn.Conv2d(3, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.places = nn.Parameter(torch.randn(1, 1 + grid[0] * grid[1], dim) * 0.02)
        self.layers = nn.Sequential(*(Layer(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.places

    def forward(self, x):
        return self.head(self.norm(self.layers(self.tokens(x)))[:, 0])


class ReducingAttention(AttentionLayer, Attention):
    def project(self, z, rows, with_values=True):
        return Heads(*self.qkv(z), scale=(self.q.in_features // self.heads) ** -0.5)

    def output(self, out, z):
        return self.out(out)


class ReducingLayer(ReducingBlock, Layer):
    def attention_input(self, x):
        return self.first(x)

    def mlp_input(self, x):
        return self.second(x)

    def shape(self):
        return BlockShape(self.attn.q.in_features, self.attn.heads, self.attn.q.in_features // self.attn.heads)


class ReducingMyViT(ReducingModel, MyViT):
    num_prefix_tokens, has_class = 1, True
    blocks, own_grid = property(lambda self: self.layers), property(lambda self: self.grid)

    def embed(self, x):
        return self.tokens(x), None  # None: no rotary table

    def embed_half(self, images):  # for methods that look at the image in front of block 0
        half = self.patch_embed(F.interpolate(images, scale_factor=0.5, mode="bilinear"))
        places = self.places[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        return (half + F.avg_pool2d(places, 2)).flatten(2).transpose(1, 2)

    def forward_head(self, tokens):
        return self.head(self.pool(tokens))


inner = {"blocks": {Layer: ReducingLayer}, "attentions": {Attention: ReducingAttention}}
register_family(Family(name="my_vit", models={MyViT: ReducingMyViT}, **inner))
