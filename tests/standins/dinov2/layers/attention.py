"""Attention of the stand-in."""

from torch import nn


class Attention(nn.Module):
    """Maps written out."""

    def __init__(self, dim, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    def forward(self, x, attn_bias=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps = self.attn_drop((self.scale * q @ k.transpose(2, 3)).softmax(3))
        return self.proj_drop(self.proj((maps @ v).transpose(1, 2).flatten(2)))


class MemEffAttention(Attention):
    """The same where xFormers is not there."""
