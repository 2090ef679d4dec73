"""transformers' ViT and DeiT towers.

Read from transformers 5.18 to 5.24.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.deit.modeling_deit import (
    DeiTAttention,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTLayer,
    DeiTModel,
)
from transformers.models.vit.modeling_vit import ViTAttention, ViTForImageClassification, ViTLayer, ViTModel

from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import linear_macs
from ..backbone import Around
from .attention import HfAttention
from .layer import HfLayer, Parts
from .tower import HfTower

PARTS = Parts("layernorm_before", "attention", "layernorm_after", ("dropout",), ("dropout",))


class ReducingViTAttention(HfAttention, ViTAttention):
    """`ViTAttention` inside a layer that reduces tokens."""


class ReducingDeiTAttention(HfAttention, DeiTAttention):
    """`DeiTAttention` inside a layer that reduces tokens."""


class ReducingViTLayer(HfLayer, ViTLayer):
    """`ViTLayer` on tokens."""

    parts = PARTS


class ReducingDeiTLayer(HfLayer, DeiTLayer):
    """`DeiTLayer` on tokens."""

    parts = PARTS


class _ClassPooler(HfTower):
    """A tower whose pooler, if it has one, is a layer on the class token."""

    layers_path, norm_name = "layers", "layernorm"

    def pooled(self, tokens: Tokens) -> Tensor | None:
        return None if self.pooler is None else self.pooler(tokens.x)

    def head_macs(self, n: int, layout: Layout) -> int:
        return 0 if self.pooler is None else linear_macs(self.pooler)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the tokens that are left."""
        options = {**kwargs, "bool_masked_pos": bool_masked_pos}
        return self.output_of(pixel_values, attention_mask, options, interpolate_pos_encoding)


class ReducingViTModel(_ClassPooler, ViTModel):
    """`ViTModel` whose layers reduce tokens."""


class ReducingDeiTModel(_ClassPooler, DeiTModel):
    """`DeiTModel`, with a distillation token behind the class token."""

    num_prefix_tokens = 2


MODELS = {ViTModel: ReducingViTModel, DeiTModel: ReducingDeiTModel}
BLOCKS = {ViTLayer: ReducingViTLayer, DeiTLayer: ReducingDeiTLayer}
ATTENTIONS = {ViTAttention: ReducingViTAttention, DeiTAttention: ReducingDeiTAttention}
AROUND = {
    ViTForImageClassification: Around("vit"),
    DeiTForImageClassification: Around("deit"),
    DeiTForImageClassificationWithTeacher: Around("deit"),
}
