"""Images of half the size, embedded as a model embeds its own: what a method in front of block 0 chooses from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layer_macs import unwrapped
from ..ops.rows import split_dim


def embed_half(model: Any, images: Tensor) -> Tensor:
    """Embedding of the images at half resolution: a token for every 2 x 2 patches [B, H / 2 * W / 2, C].

    Positions are the means of the four that a token covers; no norm or prefix is added.

    Args:
        model: with a `patch_embed` and a `_pos_embed`, as timm's.
        images: [B, C, H, W].

    Raises:
        ValueError: an odd grid, or a patch embedding that is no single convolution.
    """
    embed = getattr(model, "patch_embed", None)
    if embed is None:
        raise ValueError(
            f"{type(model).__name__} does not say how images of half the size are embedded; give its reducing class "
            "`embed_half`, or use another method"
        )
    grid = tuple(embed.dynamic_feat_size(images.shape[-2:]))
    proj = unwrapped(getattr(embed, "proj", None))
    if not isinstance(proj, nn.Conv2d) or proj.in_channels != images.shape[1]:
        raise ValueError(
            f"{type(model).__name__}.patch_embed is {type(embed).__name__}, not one convolution: images of half "
            "the size cannot be embedded by it"
        )
    pad = [patch * side - size for patch, side, size in zip(embed.patch_size, grid, images.shape[-2:])]
    # positions alone are what the model adds to patches of zeros
    zeros = images.new_zeros(1, *grid, proj.out_channels)
    zeros = zeros if getattr(embed, "output_fmt", "NLC") == "NHWC" or not embed.flatten else zeros.flatten(1, 2)
    placed = model._pos_embed(zeros)
    placed = placed[0] if isinstance(placed, tuple) else placed
    images = F.pad(images, (0, pad[1], 0, pad[0]))
    return half_tokens(model, images, embed.proj, placed[:, -grid[0] * grid[1] :], grid, embed.norm)


def half_tokens(
    model: nn.Module,
    images: Tensor,
    conv: nn.Module,
    places: Tensor,
    grid: tuple[int, int],
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A token for every 2 x 2 patches, of a model whose patches are one convolution [B, H / 2 * W / 2, C].

    Args:
        model: for the message.
        images: [B, C, H, W].
        conv: the convolution.
        places: position of every patch [1, H * W, C].
        grid: patches (high, wide).
        norm: of patches, in front of their positions; None for none.

    Raises:
        ValueError: an odd grid.
    """
    high, wide = grid
    if high % 2 or wide % 2:
        raise ValueError(f"{type(model).__name__}: the {high} x {wide} patches cannot be halved; use even grids")
    half = conv(F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False))
    half = half.flatten(2).transpose(1, 2)
    half = half if norm is None else norm(half)
    places = split_dim(places.transpose(1, 2), 2, high, wide)
    return half + F.avg_pool2d(places.float(), 2).to(half.dtype).flatten(2).transpose(1, 2)
