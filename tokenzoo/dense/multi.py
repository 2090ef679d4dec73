"""A segmentation model whose head reads the features of several blocks side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rows import split_dim
from .segmenter import Segmenter


class LayersSegmenter(Segmenter):
    """A timm ViT whose normed features after several blocks are concatenated for one head (DINOv2's "multi-scale").

    Args:
        encoder: a timm ViT-like model.
        decoder: a head that takes the channels of all these features together.
        num_classes: K.
        layers: how many blocks, counted from the last, or their indices in ascending order.
        **options: of `Segmenter`.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, num_classes: int, layers: int | Sequence[int], **options: Any
    ) -> None:
        super().__init__(encoder, decoder, num_classes, **options)
        depth = len(encoder.blocks)
        taken = list(range(depth - layers, depth)) if isinstance(layers, int) else list(layers)
        if not taken or sorted(set(taken)) != taken or taken[0] < 0 or taken[-1] >= depth:
            raise ValueError(
                f"LayersSegmenter: layers={layers!r}; give a count or ascending indices of the {depth} blocks"
            )
        self.layers = taken

    def class_maps(self, images: Tensor) -> Tensor:
        """Class scores per patch [B, K, H / P, W / P]; reduced tokens are carried back at every block that is read."""
        maps = self.encoder.forward_intermediates(
            images, indices=self.layers, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        features = torch.cat(maps, dim=1)
        scores = self.decoder(features.flatten(2).transpose(1, 2))
        return split_dim(scores.transpose(1, 2), 2, *features.shape[-2:])

    def head_macs(self, num_tokens: int, grid: tuple[int, int] | None = None) -> int:
        """Multiply-adds of the decoder for one image; it always sees the full grid, if that is given.

        Args:
            num_tokens: patch tokens that the decoder sees.
            grid: patches (high, wide).
        """
        return self.decoder.macs(num_tokens if grid is None else grid[0] * grid[1])
