"""transformers' SigLIP vision tower (SigLIP 2 at fixed resolution is the same class), alone and inside SigLIP models.

Read from transformers 5.18 to 5.24. The attention pooling of the tower adds log sizes and leaves out padding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipModel,
    SiglipMultiheadAttentionPoolingHead,
    SiglipVisionModel,
)

from ...core.tokens import Layout, Tokens
from ...ops.attention import key_bias
from ..backbone import Around
from ..features import Reads
from .around import ReadsMean
from .attention import HfAttention
from .clip import PARTS
from .layer import HfLayer
from .naming import PlainName
from .tower import HfTower


class ReducingSiglipAttention(HfAttention, SiglipAttention):
    """`SiglipAttention` inside a layer that reduces tokens."""

    out, scale_name, dropout_name = "out_proj", "scale", "dropout"


class ReducingSiglipEncoderLayer(HfLayer, SiglipEncoderLayer):
    """`SiglipEncoderLayer` on tokens."""

    parts = PARTS


class BiasedPooling(PlainName):
    """Mixin of an attention pooling with a probe: a bias may be added to the logits of its keys."""

    def forward(self, hidden_state: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, C].

        Args:
            hidden_state: tokens behind the final norm.
            bias: [B, 1, 1, N] or None.
        """
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)
        mask = None
        if bias is not None:
            mask = bias.to(hidden_state.dtype).expand(-1, self.attention.num_heads, -1, -1).flatten(0, 1)
        pooled = self.attention(probe, hidden_state, hidden_state, attn_mask=mask)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class ReducingSiglipMultiheadAttentionPoolingHead(BiasedPooling, SiglipMultiheadAttentionPoolingHead):
    """`SiglipMultiheadAttentionPoolingHead` of tokens with sizes."""


def pooling_macs(head: Any, n: int) -> int:
    """Multiply-adds of an attention pooling with one probe over n tokens."""
    width = head.attention.embed_dim
    hidden = sum(layer.weight.numel() for layer in (head.mlp.fc1, head.mlp.fc2))
    return 2 * width * width + hidden + 2 * width * n * (width + 1)


class SiglipTower(HfTower):
    """A tower of patches alone, pooled by a probe that attends."""

    norm_name, conv_path = "post_layernorm", "embeddings.patch_embedding"
    num_prefix_tokens, has_class = 0, False

    def head_reads(self) -> Reads:
        return Reads(attends=True) if self.use_head else Reads(mean=True)

    def pooled(self, tokens: Tokens) -> Tensor | None:
        if not self.use_head:
            return None
        first = tokens.layout.own_prefix
        size = tokens.size[:, first:] if tokens.size is not None and self.tokenzoo_recipe.proportional else None
        bias = key_bias(size, None if tokens.valid is None else tokens.valid[:, first:])
        if tokens.gate is not None:
            bias = tokens.gate._replace(open=tokens.gate.open[:, first:]).bias(bias)
        return self.head(tokens.x[:, first:], bias=bias)

    def head_macs(self, n: int, layout: Layout) -> int:
        return pooling_macs(self.head, n - layout.own_prefix) if self.use_head else 0


class ReducingSiglipVisionModel(SiglipTower, SiglipVisionModel):
    """`SiglipVisionModel` whose layers reduce tokens."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False, **kwargs: Any) -> Any:
        """As upstream, with the tokens that are left."""
        return self.output_of(pixel_values, None, kwargs, interpolate_pos_encoding)


class ReducingSiglipForImageClassification(ReadsMean, SiglipForImageClassification):
    """The mean of the tokens by size."""

    tower = "vision_model"
    tokenzoo_options = {"tokenzoo_reads": Reads(mean=True, include_prefix=True)}


MODELS = {SiglipVisionModel: ReducingSiglipVisionModel}
BLOCKS = {SiglipEncoderLayer: ReducingSiglipEncoderLayer}
ATTENTIONS = {SiglipAttention: ReducingSiglipAttention}
PARTS_OUTSIDE = {SiglipMultiheadAttentionPoolingHead: ReducingSiglipMultiheadAttentionPoolingHead}
AROUND = {
    SiglipModel: Around("vision_model"),
    SiglipForImageClassification: Around("vision_model", ReducingSiglipForImageClassification),
}
