"""Tokens-to-token: three overlapping unfolds with a small transformer or performer after each of the first two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, use_fused_attn
from torch import Tensor, nn

from ..ops.attention import Heads, attend, full_precision
from ..ops.layer_macs import linear_macs
from ._embed import MapEmbed
from ._place import made_on


class WideAttention(nn.Module):
    """One head whose logits are scaled by the width of the input; the values are added to the output.

    Args:
        in_dim: channels of the input.
        dim: channels of queries, keys, values and the output.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.scale = in_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, in_dim] -> [B, N, dim]."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        if torch.jit.is_scripting():  # the compiler does not read the shared core
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).squeeze(1)
        else:
            out = attend(Heads(q, k, v, self.scale, fused=self.fused_attn))
        return v.squeeze(1) + self.proj(out)


class TokenTransformer(nn.Module):
    """Transformer layer that narrows its tokens: [B, N, in_dim] -> [B, N, dim]. Parameters as released."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = WideAttention(in_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def macs(self, tokens: int) -> int:
        """Multiply-adds of one image: linear layers, logits and weighted sums; norms are free."""
        return tokens * linear_macs(self) + 2 * tokens**2 * self.attn.dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """Performer layer that narrows its tokens: [B, N, in_dim] -> [B, N, dim]. Parameters as released.

    Attention through positive random features: linear in N. The features `w` are drawn once and never trained. They
    and the sums over tokens are computed in float32, since the exponentials leave the range of half precision.

    Args:
        in_dim: channels of the input.
        dim: channels of the output.
        kernel_ratio: random features over `dim`.
        drop: dropout after the projection and after the MLP.
    """

    def __init__(self, in_dim: int, dim: int, kernel_ratio: float = 0.5, drop: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(drop))
        self.features = int(dim * kernel_ratio)
        w = nn.init.orthogonal_(torch.empty(self.features, dim)) * self.features**0.5
        self.register_buffer("w", w)  # a parameter in the authors' code, which nothing trains

    def macs(self, tokens: int) -> int:
        """Multiply-adds of one image: linear layers, random features, and the sums over tokens; norms are free."""
        return tokens * (linear_macs(self) + 4 * self.w.numel() + self.features)

    def kernel_features(self, u: Tensor) -> Tensor:
        """Random features of queries or keys: [B, N, dim] -> [B, N, m], float32."""
        logits = F.linear(u, self.w.float()) - u.square().sum(dim=-1, keepdim=True) / 2
        return logits.exp() / self.features**0.5

    def attend(self, x: Tensor) -> Tensor:
        """Attention with the values added: [B, N, in_dim] -> [B, N, dim]."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        if torch.jit.is_scripting():
            y = self._average(q.float(), k.float(), v.float())
        else:
            with full_precision(x):
                y = self._average(q.float(), k.float(), v.float())
        return v + self.dp(self.proj(y.to(v.dtype)))

    def _average(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = self.kernel_features(q), self.kernel_features(k)
        mass = (queries @ keys.sum(dim=1).unsqueeze(-1)) + 1e-8  # [B, N, 1], as in the published denominator
        return queries @ (keys.transpose(1, 2) @ v) / mass

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return x + self.mlp(self.norm2(x))


KINDS = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(MapEmbed):
    """Image to tokens of 16 x 16 pixels by overlapping neighbourhoods: 7 x 7 pixels, then twice 3 x 3 tokens.

    Args:
        img_size: image size in pixels.
        patch_size: 16.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
        tokens_type: "performer" or "transformer".
        token_dim: channels between the steps.
        bias: bias of the last projection.
        device: where parameters lie.
        dtype: their number format.
        size_options: `strict_img_size`, `dynamic_img_pad`, `output_fmt`, `flatten` of the base class.

    Raises:
        ValueError: another patch size, or an unknown type.

    Source: Yuan et al., "Tokens-to-Token ViT", ICCV 2021.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        tokens_type: str = "performer",
        token_dim: int = 64,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **size_options: Any,
    ):
        super().__init__(img_size, patch_size, **size_options)
        if self.patch_size != (16, 16):
            raise ValueError(f"TokensToToken: its three steps make patches of (16, 16), not {self.patch_size}")
        if tokens_type not in KINDS:
            raise ValueError(f"TokensToToken: tokens_type={tokens_type!r}; choose one of {', '.join(KINDS)}")
        step = KINDS[tokens_type]
        with made_on(device):
            self.attention1 = step(in_chans * 7 * 7, token_dim)
            self.attention2 = step(token_dim * 3 * 3, token_dim)
            self.project = nn.Linear(token_dim * 3 * 3, embed_dim, bias=bias)
        self.to(dtype=dtype)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of one image with a grid of tokens (high, wide); norms are free."""
        tokens = grid[0] * grid[1]
        return self.attention1.macs(16 * tokens) + self.attention2.macs(4 * tokens) + tokens * linear_macs(self.project)

    def embed_map(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> [B, H / 16, W / 16, D]."""
        high, wide = x.shape[2] // 4, x.shape[3] // 4
        tokens = self.attention1(_neighbourhoods(x, 7, 4))  # [B, H / 4 * W / 4, T]
        tokens = self.attention2(_neighbourhoods(tokens.transpose(1, 2).unflatten(2, [high, wide]), 3, 2))
        tokens = self.project(_neighbourhoods(tokens.transpose(1, 2).unflatten(2, [high // 2, wide // 2]), 3, 2))
        return tokens.unflatten(1, [high // 4, wide // 4])


def _neighbourhoods(x: Tensor, side: int, stride: int) -> Tensor:
    """Overlapping windows of a map [B, C, H, W] as tokens [B, N, C * side * side], channels first."""
    padding = (side - stride + 1) // 2  # 2 for windows of 7 with stride 4, 1 for windows of 3 with stride 2
    return F.unfold(x, side, stride=stride, padding=padding).transpose(1, 2)
