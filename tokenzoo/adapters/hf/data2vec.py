"""transformers' Data2Vec vision tower: BEiT with attention and MLP in parts of older names.

Read from transformers 5.18 to 5.24. Its attention does not go through transformers' attention interface: the class of
its inner layer says whether it runs fused. That inner layer is run part by part.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionAttention,
    Data2VecVisionForImageClassification,
    Data2VecVisionLayer,
    Data2VecVisionModel,
    Data2VecVisionModelOutputWithPooling,
    Data2VecVisionSdpaSelfAttention,
)

from ...core.method import BlockShape
from ...ops.attention import Heads
from ...ops.layer_macs import linear_macs
from ...ops.rows import split_dim
from ..attending import AttentionLayer
from ..backbone import Around
from ..block import BlockMacs
from .beit import BiasedLayer, BiasedTower
from .naming import PlainName


class ReducingData2VecVisionAttention(PlainName, AttentionLayer, Data2VecVisionAttention):
    """`Data2VecVisionAttention` inside a layer that reduces tokens."""

    def _split(self, x: Tensor) -> Tensor:
        return split_dim(x, 2, -1, self.attention.attention_head_size).transpose(1, 2)

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        inner = self.attention
        q, k = self._split(inner.query(z)), self._split(inner.key(z))
        v = self.project_values(z) if with_values else None
        dropout = inner.dropout.p if self.training else 0.0
        return Heads(q, k, v, inner.attention_head_size**-0.5, fused=_fused(self), dropout=dropout, drop=inner.dropout)

    def project_values(self, z: Tensor) -> Tensor:
        return self._split(self.attention.value(z))

    # `output` is a module of the layer, which this method hides while it is patched
    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self._modules["output"](out, z)

    def forward(self, x: Tensor, *args: Any, attend: Any = None, **kwargs: Any) -> Any:
        """As before patching, where hooks see (output, None) of a layer that hands out no map."""
        out = super().forward(x, *args, attend=attend, **kwargs)
        return out if attend is None else (out, None)


def _fused(attn: Any) -> bool:
    """Whether an attention layer runs on the fused kernel."""
    return isinstance(attn.attention, Data2VecVisionSdpaSelfAttention)


class ReducingData2VecVisionLayer(BiasedLayer, Data2VecVisionLayer):
    """`Data2VecVisionLayer` on tokens."""

    @property
    def own_bias(self) -> Any:
        inner = self.attention.attention
        return inner.relative_position_bias if inner.has_relative_position_bias else None

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        y = outs[0]
        return self.drop_path(y if self.lambda_1 is None else self.lambda_1 * y)

    def mlp_branch(self, z: Tensor) -> Tensor:
        y = self.output(self.intermediate(z))
        return self.drop_path(y if self.lambda_2 is None else self.lambda_2 * y)

    def shape(self) -> BlockShape:
        inner = self.attention.attention
        return BlockShape(inner.config.hidden_size, inner.num_attention_heads, inner.attention_head_size)

    def macs(self) -> BlockMacs:
        dim = self.shape().dim
        mlp = linear_macs(self.intermediate) + linear_macs(self.output)
        return BlockMacs(2 * dim * dim, dim * dim, 2 * dim, dim * dim, mlp)

    @property
    def fused(self) -> bool:
        return _fused(self.attention)

    def attention_path(self, biased: bool) -> str:
        return "fused (sdpa)" if self.fused else "unfused (eager)"


class ReducingData2VecVisionModel(BiasedTower, Data2VecVisionModel):
    """`Data2VecVisionModel` whose layers reduce tokens."""

    layers_path = "encoder.layer"

    @property
    def shared_bias(self) -> Any:
        return self.encoder.relative_position_bias if self.encoder.has_relative_position_bias else None

    def _embedded(self, x: Tensor) -> Tensor:
        return super()._embedded(x)[0]

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the tokens that are left; positions follow the size of the images in any case."""
        given = {
            "bool_masked_pos": bool_masked_pos, "output_attentions": output_attentions, "return_dict": return_dict,
            "output_hidden_states": output_hidden_states,
        }  # fmt: skip
        return self.result(pixel_values, None, {**kwargs, **given}, Data2VecVisionModelOutputWithPooling)


MODELS = {Data2VecVisionModel: ReducingData2VecVisionModel}
BLOCKS = {Data2VecVisionLayer: ReducingData2VecVisionLayer}
ATTENTIONS = {Data2VecVisionAttention: ReducingData2VecVisionAttention}
AROUND = {Data2VecVisionForImageClassification: Around("data2vec_vision")}
