"""Tokens of Vision Mamba: overlapping patches, class tokens anywhere in the sequence, positions for any grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_notrace_function
from torch import Tensor, nn

from ...ops.layer_macs import conv_macs
from .._embed import MapEmbed

_PLACES = {"middle": 1, "first": 1, "both": 2, "none": 0}


@register_notrace_function
def class_rows(cls_position: str, num_patches: int) -> tuple[int, ...]:
    """Where class tokens are in a sequence of tokens.

    Args:
        cls_position: "middle" (behind half of the patches, rounded down), "first", "both" (first and last) or "none".
        num_patches: patch tokens in the sequence.

    Raises:
        ValueError: an unknown `cls_position`.
    """
    if cls_position not in _PLACES:
        raise ValueError(f"class_rows: cls_position={cls_position!r}; choose one of {', '.join(_PLACES)}")
    return {"middle": (num_patches // 2,), "first": (0,), "both": (0, num_patches + 1), "none": ()}[cls_position]


def num_class_tokens(cls_position: str) -> int:
    """Class tokens that a `cls_position` stands for."""
    return len(class_rows(cls_position, 0))


@register_notrace_function
def insert_rows(patches: Tensor, rows: Tensor, index: tuple[int, ...]) -> Tensor:
    """Sequence [B, M + P, C] of patches [B, M, C] with rows [B, P, C] at ascending places of the result."""
    pieces, start = [], 0
    for row, place in enumerate(index):
        pieces += [patches[:, start : place - row], rows[:, row : row + 1]]
        start = place - row
    return torch.cat([*pieces, patches[:, start:]], dim=1) if index else patches


@register_notrace_function
def take_rows(x: Tensor, index: tuple[int, ...]) -> Tensor:
    """Rows [B, P, C] of a sequence [B, L, C]."""
    return torch.cat([x[:, i : i + 1] for i in index], dim=1) if index else x[:, :0]


@register_notrace_function
def split_rows(x: Tensor, index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Patches [B, M, C] and rows [B, P, C] of a sequence [B, M + P, C], rows at ascending places."""
    if not index:
        return x, take_rows(x, index)
    edges = [-1, *index, x.shape[1]]
    patches = torch.cat([x[:, low + 1 : high] for low, high in zip(edges, edges[1:])], dim=1)
    return patches, take_rows(x, index)


@register_notrace_function
def fit_positions(positions: Tensor, cls_position: str, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions [1, L', C] of another grid: class rows are taken out, the rest is interpolated, and they go back in.

    Args:
        positions: [1, L, C].
        cls_position: where the class rows are.
        old: present grid (high, wide).
        new: wanted grid.
    """
    if old == new:
        return positions
    patches, rows = split_rows(positions, class_rows(cls_position, old[0] * old[1]))
    maps = patches.float().unflatten(1, old).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False)
    patches = maps.flatten(2).transpose(1, 2).to(positions.dtype)
    return insert_rows(patches, rows, class_rows(cls_position, new[0] * new[1]))


class StridedEmbed(MapEmbed):
    """Patches by one convolution, overlapping where the stride is below the patch size.

    Args:
        img_size: image size in pixels.
        patch_size: pixels per patch, one number or (high, wide).
        stride: pixels from patch to patch, likewise; None for the patch size.
        in_chans: channels of the image.
        embed_dim: channels of the tokens.
        strict_img_size: refuse other sizes than `img_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        strict_img_size: bool = True,
    ):
        # the base computes the grid, which depends on the stride
        self.stride = to_2tuple(stride or patch_size)
        super().__init__(img_size, patch_size, strict_img_size=strict_img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride)

    def _check_multiple(self, high: int, wide: int) -> None:
        (p, q), (down, right) = self.patch_size, self.stride
        if high < p or wide < q or (high - p) % down or (wide - q) % right:
            raise ValueError(
                f"StridedEmbed: an image of {(high, wide)} pixels is not a whole number of {(p, q)} patches at a "
                f"stride of {(down, right)}; resize or pad it"
            )

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from token to token, the larger side or both."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of tokens (high, wide) of an image size."""
        (high, wide), (p, q), (down, right) = img_size, self.patch_size, self.stride
        return (high - p) // down + 1, (wide - q) // right + 1

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of one image with a grid of tokens (high, wide)."""
        return conv_macs(self.proj) * grid[0] * grid[1]

    def embed_map(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> map [B, h, w, D]."""
        return self.proj(x).permute(0, 2, 3, 1)
