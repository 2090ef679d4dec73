"""transformers' CLIP vision tower, alone and inside CLIP models, whose text tower stays as it is.

Read from transformers 5.18 to 5.24.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from ...core.tokens import Tokens
from ..backbone import Around
from .around import ReadsMean
from .attention import HfAttention
from .layer import HfLayer, Parts
from .tower import HfTower

PARTS = Parts("layer_norm1", "self_attn", "layer_norm2")


class ReducingCLIPAttention(HfAttention, CLIPAttention):
    """`CLIPAttention` inside a layer that reduces tokens."""

    out, scale_name, dropout_name = "out_proj", "scale", "dropout"


class ReducingCLIPEncoderLayer(HfLayer, CLIPEncoderLayer):
    """`CLIPEncoderLayer` on tokens."""

    parts = PARTS


class ReducingCLIPVisionModel(HfTower, CLIPVisionModel):
    """`CLIPVisionModel`: the final norm is for the class token alone."""

    conv_path = "embeddings.patch_embedding"

    @property
    def norm_pre(self) -> nn.Module:
        """The norm in front of block 0."""
        return self.pre_layrnorm

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.pre_layrnorm(self._embedded(x)), None

    def pooled(self, tokens: Tokens) -> Tensor:
        return self.post_layernorm(tokens.x[:, 0])

    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool | None = False, **kwargs: Any
    ) -> Any:
        """As upstream, with the tokens that are left."""
        return self.output_of(pixel_values, None, kwargs, interpolate_pos_encoding)


class ReducingCLIPForImageClassification(ReadsMean, CLIPForImageClassification):
    """The mean of the patches by size, without the final norm."""

    tower = "vision_model"


MODELS = {CLIPVisionModel: ReducingCLIPVisionModel}
BLOCKS = {CLIPEncoderLayer: ReducingCLIPEncoderLayer}
ATTENTIONS = {CLIPAttention: ReducingCLIPAttention}
AROUND = {
    CLIPModel: Around("vision_model"),
    CLIPVisionModelWithProjection: Around("vision_model"),
    CLIPForImageClassification: Around("vision_model", ReducingCLIPForImageClassification),
}
