"""transformers' DINOv2 towers, with and without registers.

Read from transformers 5.18 to 5.24.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Attention,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Layer,
    Dinov2Model,
)
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersModel,
)

from ..backbone import Around
from .around import ReadsMean
from .attention import HfAttention
from .feature_maps import GivesFeatureMaps
from .layer import HfLayer, Parts
from .tower import HfTower

PARTS = Parts("norm1", "attention", "norm2", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))


class ReducingDinov2Attention(HfAttention, Dinov2Attention):
    """`Dinov2Attention` inside a layer that reduces tokens."""


class ReducingDinov2WithRegistersAttention(HfAttention, Dinov2WithRegistersAttention):
    """`Dinov2WithRegistersAttention` inside a layer that reduces tokens."""


class ReducingDinov2Layer(HfLayer, Dinov2Layer):
    """`Dinov2Layer` on tokens."""

    parts = PARTS


class ReducingDinov2WithRegistersLayer(HfLayer, Dinov2WithRegistersLayer):
    """`Dinov2WithRegistersLayer` on tokens."""

    parts = PARTS


class DinoTower(HfTower):
    """The class token is pooled; positions follow the size of the image by themselves."""

    layers_path, norm_name, interpolates_alone = "encoder.layer", "layernorm", True

    @property
    def num_prefix_tokens(self) -> int:
        """The class token and the registers behind it."""
        return 1 + getattr(self.config, "num_register_tokens", 0)


class DinoModel(DinoTower):
    """The tower as a model with a pooled class token."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the tokens that are left."""
        return self.output_of(pixel_values, attention_mask, {**kwargs, "bool_masked_pos": bool_masked_pos})


class ReducingDinov2Model(DinoModel, Dinov2Model):
    """`Dinov2Model` whose layers reduce tokens."""


class ReducingDinov2WithRegistersModel(DinoModel, Dinov2WithRegistersModel):
    """`Dinov2WithRegistersModel`: class token, registers, patches."""


class ReducingDinov2Backbone(GivesFeatureMaps, DinoTower, Dinov2Backbone):
    """`Dinov2Backbone`, its feature maps on the full grid."""


class ReducingDinov2WithRegistersBackbone(GivesFeatureMaps, DinoTower, Dinov2WithRegistersBackbone):
    """`Dinov2WithRegistersBackbone`, its feature maps on the full grid."""


class ReducingDinov2ForImageClassification(ReadsMean, Dinov2ForImageClassification):
    """The class token beside the mean of the patches by size."""

    tower = "dinov2"


class ReducingDinov2WithRegistersForImageClassification(ReadsMean, Dinov2WithRegistersForImageClassification):
    """The class token beside the mean of the patches by size."""

    tower = "dinov2_with_registers"


MODELS = {
    Dinov2Model: ReducingDinov2Model,
    Dinov2WithRegistersModel: ReducingDinov2WithRegistersModel,
    Dinov2Backbone: ReducingDinov2Backbone,
    Dinov2WithRegistersBackbone: ReducingDinov2WithRegistersBackbone,
}
BLOCKS = {Dinov2Layer: ReducingDinov2Layer, Dinov2WithRegistersLayer: ReducingDinov2WithRegistersLayer}
ATTENTIONS = {
    Dinov2Attention: ReducingDinov2Attention,
    Dinov2WithRegistersAttention: ReducingDinov2WithRegistersAttention,
}
AROUND = {
    Dinov2ForImageClassification: Around("dinov2", ReducingDinov2ForImageClassification),
    Dinov2WithRegistersForImageClassification: Around(
        "dinov2_with_registers", ReducingDinov2WithRegistersForImageClassification
    ),
}
