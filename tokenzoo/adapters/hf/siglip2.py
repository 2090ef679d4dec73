"""transformers' SigLIP 2 tower for images of any size (NaFlex): batches of patches, padded to the longest.

Read from transformers 5.18 to 5.24. Padding is never attended to, pooled or chosen; where images have grids of their
own, methods that look at places on a grid refuse them by name. Plain images [B, C, H, W] are cut into patches as the
image processor of the package does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2Attention,
    Siglip2EncoderLayer,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2MultiheadAttentionPoolingHead,
    Siglip2VisionModel,
)

from ...core.tokens import Tokens
from ...ops.layer_macs import linear_macs
from ...ops.rows import split_dim
from ..backbone import Around
from ..features import Reads
from ..halving import half_tokens
from .around import TellsTower
from .attention import HfAttention
from .clip import PARTS
from .layer import HfLayer
from .siglip import BiasedPooling, SiglipTower
from .tower import pair


class ReducingSiglip2Attention(HfAttention, Siglip2Attention):
    """`Siglip2Attention` inside a layer that reduces tokens."""

    out, scale_name, dropout_name = "out_proj", "scale", "dropout"


class ReducingSiglip2EncoderLayer(HfLayer, Siglip2EncoderLayer):
    """`Siglip2EncoderLayer` on tokens."""

    parts = PARTS


class ReducingSiglip2MultiheadAttentionPoolingHead(BiasedPooling, Siglip2MultiheadAttentionPoolingHead):
    """`Siglip2MultiheadAttentionPoolingHead` of tokens with sizes."""


class ReducingSiglip2VisionModel(SiglipTower, Siglip2VisionModel):
    """`Siglip2VisionModel` whose layers reduce tokens."""

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return tuple(side // step for side, step in zip(size, pair(self.config.patch_size)))

    @property
    def own_grid(self) -> tuple[int, int]:
        return pair(int(self.config.num_patches**0.5))

    def embed_macs(self, grid: tuple[int, int]) -> int:
        return linear_macs(self.patch_embed) * grid[0] * grid[1]

    def _patches(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as patches [B, N, P * P * C], channels last."""
        (high, wide), side = self.grid_of(images.shape[-2:]), self.config.patch_size
        cells = split_dim(images[..., : high * side, : wide * side], 2, high, side)
        cells = split_dim(cells, 4, wide, side)  # [B, C, high, P, wide, P]
        return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _embedded(self, x: Tensor) -> Tensor:
        grid = self.grid_of(x.shape[-2:])
        shapes = torch.tensor([grid], device=x.device).expand(x.shape[0], -1)
        return self.embeddings(self._patches(x), shapes)

    def embed_half(self, images: Tensor) -> Tensor:
        def cut(part: Tensor) -> Tensor:
            rows = self.patch_embed(self._patches(part).to(self.patch_embed.weight.dtype))
            return split_dim(rows.transpose(1, 2), 2, *self.grid_of(part.shape[-2:]))

        empty = torch.zeros_like(images[:1])
        places = self._embedded(empty) - cut(empty).flatten(2).transpose(1, 2)
        return half_tokens(self, images, cut, places, self.grid_of(images.shape[-2:]))

    def _begin(self, patches: Tensor, mask: Tensor | None, shapes: Tensor, trace: bool, dense: bool) -> Tokens:
        """What enters layer 0, of a batch of patches.

        Args:
            patches: [B, N, P * P * C].
            mask: [B, N], 0 for padding, or None.
            shapes: patches (high, wide) of every image [B, 2].
            trace: keep the maps.
            dense: also keep the values that dropped tokens had.

        Raises:
            ValueError: padding stands in front of a patch, or a method needs images.
        """
        dense = dense or self.pools_all or self.tokenzoo_recipe.keeps_trace
        valid = None if mask is None or bool(mask.all()) else mask.bool()
        if valid is not None and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            raise ValueError(
                f"{type(self).__name__}: pixel_attention_mask has padding in front of real patches; put the real ones "
                "of each image first"
            )
        for step in self.blocks[0].tokenzoo.at("embed"):
            raise step.error("looks at images, but was given patches; call the tower with images [B, C, H, W]")
        x = self.embeddings(patches, shapes)
        same = valid is None and x.shape[0] > 0 and bool((shapes == shapes[:1]).all())
        grid = tuple(shapes[0].tolist()) if same else (1, x.shape[1])
        layout = self.layout(grid)._replace(keep_values=dense, own_grids=not same)
        layout.check_length(x.shape[1], type(self).__name__)
        return Tokens(x, layout, valid=valid, trace=() if trace or dense else None)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the tokens that are left.

        Args:
            pixel_values: patches [B, N, P * P * C]; or images [B, C, H, W], without the arguments that follow.
            pixel_attention_mask: [B, N], 0 for padding.
            spatial_shapes: patches (high, wide) of every image [B, 2].
            **kwargs: options of upstream.
        """
        if spatial_shapes is None:
            return self.output_of(pixel_values, None, kwargs)
        mask = kwargs.pop("tokenzoo_mask", pixel_attention_mask)

        def begin(trace: bool, dense: bool) -> Tokens:
            return self._begin(pixel_values, mask, spatial_shapes, trace, dense)

        return self.output_of(pixel_values, None, kwargs, begin=begin)


class ReducingSiglip2ForImageClassification(TellsTower, Siglip2ForImageClassification):
    """The mean of the tokens by size; upstream's own mean would take the mask for that of the tokens that are left."""

    tower = "vision_model"
    tokenzoo_options = {"tokenzoo_reads": Reads(mean=True, include_prefix=True)}

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, **self.tokenzoo_options, "tokenzoo_mask": kwargs.get("pixel_attention_mask")} | {
            "pixel_attention_mask": None
        }


MODELS = {Siglip2VisionModel: ReducingSiglip2VisionModel}
BLOCKS = {Siglip2EncoderLayer: ReducingSiglip2EncoderLayer}
ATTENTIONS = {Siglip2Attention: ReducingSiglip2Attention}
PARTS_OUTSIDE = {Siglip2MultiheadAttentionPoolingHead: ReducingSiglip2MultiheadAttentionPoolingHead}
AROUND = {
    Siglip2Model: Around("vision_model"),
    Siglip2ForImageClassification: Around("vision_model", ReducingSiglip2ForImageClassification),
}
