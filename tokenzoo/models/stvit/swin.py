"""Parts of Swin that STViT-R stands on: attention in windows, block, step to the next stage.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_, use_fused_attn
from timm.models import register_notrace_module
from torch import Tensor, nn

from ...ops.attention import Heads, attend
from ...ops.cells.neighbourhoods import from_windows, pad_to_windows, to_windows

_APART = -100.0  # published logit offset between the parts of a window that a shift brings together


@register_notrace_module  # sizes decide
class WindowAttention(nn.Module):
    """Multi-head self-attention inside of windows, with a bias by the places of query and key.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        window: tokens of a window's side.
        qkv_bias: bias of the first projection.
        attn_drop: dropout of the attention map.
        proj_drop: dropout behind the projection.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, num_heads: int, window: int, qkv_bias: bool = True, attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"WindowAttention: {num_heads} heads do not divide {dim} channels; choose a divisor")
        self.num_heads = num_heads
        self.window = window
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def position_bias(self) -> Tensor:
        """What the places of query and key add to the logits [H, window ** 2, window ** 2]."""
        table, side = self.relative_position_bias_table, self.window
        place = torch.arange(side, device=table.device)
        apart = place[:, None] - place[None] + side - 1  # [query, key] along one direction
        index = apart[:, None, :, None] * (2 * side - 1) + apart[None, :, None, :]
        return table[index.flatten()].unflatten(0, (side * side, side * side)).permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Windows [B, M, N, C], and what is added to their logits [M, N, N] -> [B, M, N, C]."""
        windows = x.shape[1]
        q, k, v = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B, M, H, N, D]
        added = self.position_bias()[None]
        added = added.expand(windows, -1, -1, -1) if bias is None else added + bias[:, None]
        # windows stand beside the heads, so that the bias is the same for all images and needs no copies
        # (contiguous: else the ONNX exporter loses track of the strides of a single window)
        q, k, v = (rows.flatten(1, 2).contiguous() for rows in (q, k, v))
        heads = Heads(q, k, v, self.scale, fused=self.fused_attn)
        dropout = self.attn_drop.p if self.training else 0.0
        out = attend(heads._replace(dropout=dropout), added.flatten(0, 1)[None])  # [B, N, M * C]
        return self.proj_drop(self.proj(out.unflatten(2, (windows, -1)).transpose(1, 2)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)  # a constant that released files hold
        super()._load_from_state_dict(state_dict, prefix, *args)


@register_notrace_module  # sizes decide
class SwinBlock(nn.Module):
    """Attention inside of windows, shifted by half a window or not, and MLP.

    Maps that are no whole number of windows are filled up with zeros behind the first norm. A map of one window is not
    shifted.

    Args:
        dim: channels C.
        num_heads: heads.
        window: tokens of a window's side.
        shift: tokens that windows are shifted by; 0 for none.
        mlp_ratio: hidden channels of the MLP over C.
        qkv_bias: bias of the attention's first projection.
        drop: dropout of the projections and of the MLP.
        attn_drop: dropout of the attention map.
        drop_path: stochastic depth.
        norm_layer: norm of C channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int = 7,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
    ):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, num_heads, window, qkv_bias, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        high, wide = x.shape[1], x.shape[2]
        x = pad_to_windows(x, self.window)
        grid = x.shape[1], x.shape[2]
        shift = 0 if max(grid) <= self.window else self.shift
        bias = None
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            bias = shifted_bias(grid, self.window, shift, x)
        x = from_windows(self.attn(to_windows(x, self.window), bias), grid, self.window)
        x = x.roll((shift, shift), (1, 2)) if shift else x
        return x[:, :high, :wide]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}attn_mask", None)  # follows from the size of the map; released files hold it
        super()._load_from_state_dict(state_dict, prefix, *args)


def shifted_bias(grid: tuple[int, int], window: int, shift: int, like: Tensor) -> Tensor:
    """What keeps apart, in a shifted map, tokens that did not lie side by side.

    Args:
        grid: size of the map (high, wide), whole windows.
        window: tokens of a window's side.
        shift: tokens that the map was shifted by.
        like: gives device and number format.

    Returns:
        [M, window ** 2, window ** 2].
    """
    parts = []
    for size in grid:
        place = torch.arange(size, device=like.device)
        parts.append((place >= size - window).long() + (place >= size - shift).long())
    labels = (parts[0][:, None] * 3 + parts[1])[None, :, :, None]
    labels = to_windows(labels, window)[0, :, :, 0]  # [M, N]
    return (labels[:, :, None] != labels[:, None]).to(like.dtype) * _APART


@register_notrace_module  # sizes decide
class PatchMerging(nn.Module):
    """Puts the channels of 2 x 2 tokens together, norms and halves them; an odd side is filled up with zeros.

    Args:
        dim: channels C.
        norm_layer: norm of 4 C channels.
    """

    def __init__(self, dim: int, norm_layer: Any = nn.LayerNorm):
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H / 2, W / 2, 2 C]."""
        x = pad_to_windows(x, 2)
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, -1)))
