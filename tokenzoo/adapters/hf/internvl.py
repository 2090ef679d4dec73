"""transformers' vision tower of InternVL: BEiT's layers without a position bias, with norms of queries and keys.

Read from transformers 5.18 to 5.24.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionAttention,
    InternVLVisionLayer,
    InternVLVisionModel,
    InternVLVisionModelOutputWithPooling,
)

from ...core.tokens import Tokens
from ...ops.attention import Heads
from .attention import HfAttention
from .layer import HfLayer, Parts
from .outputs import asked
from .tower import HfTower


class ReducingInternVLVisionAttention(HfAttention, InternVLVisionAttention):
    """`InternVLVisionAttention` inside a layer that reduces tokens; norms see all heads of a token together."""

    scale_name = "scale"

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        q, k = self._split(self.q_norm(self.q_proj(z))), self._split(self.k_norm(self.k_proj(z)))
        return self._heads(q, k, self.project_values(z) if with_values else None)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.projection_dropout(self.projection_layer(out))


class ReducingInternVLVisionLayer(HfLayer, InternVLVisionLayer):
    """`InternVLVisionLayer` on tokens."""

    parts = Parts("layernorm_before", "attention", "layernorm_after", (), ("dropout",))

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.lambda_1 * outs[0]

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.lambda_2 * super().mlp_branch(z)


class ReducingInternVLVisionModel(HfTower, InternVLVisionModel):
    """`InternVLVisionModel`; there is no pooled output."""

    layers_path, norm_name, interpolates_alone = "encoder.layer", "layernorm", True

    def pooled(self, tokens: Tokens) -> None:
        return None

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream, with the tokens that are left."""
        options = {**kwargs, "bool_masked_pos": bool_masked_pos}
        _, last, states = self.answer(pixel_values, None, options)
        output = InternVLVisionModelOutputWithPooling(last_hidden_state=last, hidden_states=states)
        return output if asked(self, kwargs, "return_dict") is not False else output.to_tuple()


MODELS = {InternVLVisionModel: ReducingInternVLVisionModel}
BLOCKS = {InternVLVisionLayer: ReducingInternVLVisionLayer}
ATTENTIONS = {InternVLVisionAttention: ReducingInternVLVisionAttention}
