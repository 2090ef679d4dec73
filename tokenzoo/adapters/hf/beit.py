"""transformers' BEiT and Data2Vec vision towers: a bias of the logits by the places of query and key.

Read from transformers 5.18 to 5.24. The bias, of every layer or shared by all, follows the tokens: rows and columns of
the places that are left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers.models.beit.modeling_beit import (
    BeitAttention,
    BeitBackbone,
    BeitForImageClassification,
    BeitForSemanticSegmentation,
    BeitLayer,
    BeitModel,
    BeitModelOutputWithPooling,
)

from ...core.tokens import Tokens
from ..backbone import Around
from ..features import Reads
from .around import ReadsGrid
from .attention import HfAttention
from .layer import HfLayer, Parts
from .outputs import asked
from .tower import HfTower


class Places(NamedTuple):
    """What layers make their bias from.

    Attributes:
        grid: patches (high, wide).
        shared: the bias of all layers [1, H, N, N], None without one.
    """

    grid: tuple[int, int]
    shared: Tensor | None


class BiasedLayer(HfLayer):
    """A layer with a bias of its own, a bias of all layers, or none; layer scales may be absent."""

    parts = Parts("layernorm_before", "attention", "layernorm_after")

    @property
    def own_bias(self) -> Any:
        """The module that makes the layer's own bias, None without one."""
        return self.relative_position_bias

    def position_bias(self, rope: Places | None) -> Tensor | None:
        if rope is None:
            return None
        if self.own_bias is None:
            return rope.shared
        own = self.own_bias(rope.grid, False, dim_size=1 + rope.grid[0] * rope.grid[1])
        return own if rope.shared is None else own + rope.shared

    def attention_path(self, biased: bool) -> str:
        return super().attention_path(biased or self.own_bias is not None)


class ReducingBeitAttention(HfAttention, BeitAttention):
    """`BeitAttention` inside a layer that reduces tokens."""


class ReducingBeitLayer(BiasedLayer, BeitLayer):
    """`BeitLayer` on tokens."""

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path(self.lambda_1 * self.dropout(outs[0]))

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path(self.lambda_2 * self.dropout(self.mlp(z)))


class BiasedTower(HfTower):
    """The model side: the class token or the mean of the patches is pooled."""

    norm_name, interpolates_alone, reads_positions = "layernorm", True, True

    @property
    def shared_bias(self) -> Any:
        """The module that makes the bias of all layers, None without one."""
        return self.shared_position_bias

    def embed(self, x: Tensor) -> tuple[Tensor, Places]:
        grid = self.grid_of(x.shape[-2:])
        values, shared = self._embedded(x), None
        if self.shared_bias is not None:
            shared = self.shared_bias(grid, interpolate_pos_encoding=False, dim_size=values.shape[1])
        return values, Places(grid, shared)

    def head_reads(self) -> Reads:
        mean = self.pooler is not None and self.pooler.layernorm is not None
        return Reads(mean=mean)

    def pooled(self, tokens: Tokens) -> Tensor | None:
        if self.pooler is None:
            return None
        if self.pooler.layernorm is None:
            return tokens.x[:, 0]
        return self.pooler.layernorm(self.pool_tokens(tokens, "avg"))

    def result(self, images: Tensor, mask: Tensor | None, options: dict[str, Any], output: type) -> Any:
        """What `forward` gives.

        Args:
            images: [B, C, H, W].
            mask: of tokens [B, N] or None.
            options: of upstream.
            output: upstream's class.
        """
        tokens, last, states = self.answer(images, mask, options)
        pooled = self.pooled(self.read(tokens))
        made = output(last_hidden_state=last, pooler_output=pooled, hidden_states=states)
        return made if asked(self, options, "return_dict") is not False else made.to_tuple()


class ReducingBeitModel(BiasedTower, BeitModel):
    """`BeitModel` whose layers reduce tokens."""

    layers_path = "layers"

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the tokens that are left; positions follow the size of the images in any case."""
        options = {**kwargs, "bool_masked_pos": bool_masked_pos}
        return self.result(pixel_values, attention_mask, options, BeitModelOutputWithPooling)


class ReducingBeitBackbone(ReadsGrid, BeitBackbone):
    """Feature maps on the full grid."""

    tower = "beit"


class ReducingBeitForSemanticSegmentation(ReadsGrid, BeitForSemanticSegmentation):
    """A decoder on hidden states on the full grid."""

    tower = "beit"


MODELS = {BeitModel: ReducingBeitModel}
BLOCKS = {BeitLayer: ReducingBeitLayer}
ATTENTIONS = {BeitAttention: ReducingBeitAttention}
AROUND = {
    BeitForImageClassification: Around("beit"),
    BeitBackbone: Around("beit", ReducingBeitBackbone),
    BeitForSemanticSegmentation: Around("beit", ReducingBeitForSemanticSegmentation),
}
