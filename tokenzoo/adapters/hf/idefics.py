"""transformers' vision towers of Idefics3 and SmolVLM: SigLIP for images of different sizes, padded to one.

Read from transformers 5.18 to 5.24. Patches of padding are hidden: they look at others, but no token learns of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.modeling_idefics3 import (
    Idefics3EncoderLayer,
    Idefics3VisionAttention,
    Idefics3VisionTransformer,
)
from transformers.models.smolvlm.modeling_smolvlm import (
    SmolVLMEncoderLayer,
    SmolVLMVisionAttention,
    SmolVLMVisionTransformer,
)

from ...core.tokens import Tokens
from ..features import Reads
from .attention import HfAttention
from .clip import PARTS
from .layer import HfLayer
from .outputs import asked, whole_mask
from .tower import HfTower


class ReducingIdefics3VisionAttention(HfAttention, Idefics3VisionAttention):
    """`Idefics3VisionAttention` inside a layer that reduces tokens."""

    out, scale_name, dropout_name = "out_proj", "scale", "dropout"


class ReducingSmolVLMVisionAttention(HfAttention, SmolVLMVisionAttention):
    """`SmolVLMVisionAttention` inside a layer that reduces tokens."""

    out, scale_name, dropout_name = "out_proj", "scale", "dropout"


class ReducingIdefics3EncoderLayer(HfLayer, Idefics3EncoderLayer):
    """`Idefics3EncoderLayer` on tokens."""

    parts = PARTS


class ReducingSmolVLMEncoderLayer(HfLayer, SmolVLMEncoderLayer):
    """`SmolVLMEncoderLayer` on tokens."""

    parts = PARTS


class _Padded(HfTower):
    """A tower of patches alone, some of which may be padding."""

    norm_name, conv_path = "post_layernorm", "embeddings.patch_embedding"
    num_prefix_tokens, has_class = 0, False

    def head_reads(self) -> Reads:
        return Reads(mean=True)

    def pooled(self, tokens: Any) -> None:
        return None

    def _embedded(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        x = x.to(self.patch_embed.weight.dtype)
        if real is None:
            real = torch.ones(x.shape[0], *self.grid_of(x.shape[-2:]), dtype=torch.bool, device=x.device)
        return self.embeddings(pixel_values=x, patch_attention_mask=real)

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream, with the tokens that are left.

        Args:
            pixel_values: [B, C, H, W].
            patch_attention_mask: [B, rows, columns] bool, False for patches of padding.
            **kwargs: options of upstream.
        """
        real = None if patch_attention_mask is None else patch_attention_mask.bool()
        mask = None if real is None else whole_mask(real.flatten(1))

        def begin(trace: bool, dense: bool) -> Tokens:
            return self.begin(pixel_values, self._embedded(pixel_values, real), None, mask, trace, dense)

        _, last, states = self.answer(pixel_values, mask, kwargs, begin)
        output = BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=states)
        return output if asked(self, kwargs, "return_dict") is not False else output.to_tuple()


class ReducingIdefics3VisionTransformer(_Padded, Idefics3VisionTransformer):
    """`Idefics3VisionTransformer` whose layers reduce tokens."""


class ReducingSmolVLMVisionTransformer(_Padded, SmolVLMVisionTransformer):
    """`SmolVLMVisionTransformer` whose layers reduce tokens."""


MODELS = {
    Idefics3VisionTransformer: ReducingIdefics3VisionTransformer,
    SmolVLMVisionTransformer: ReducingSmolVLMVisionTransformer,
}
BLOCKS = {
    Idefics3EncoderLayer: ReducingIdefics3EncoderLayer,
    SmolVLMEncoderLayer: ReducingSmolVLMEncoderLayer,
}
ATTENTIONS = {
    Idefics3VisionAttention: ReducingIdefics3VisionAttention,
    SmolVLMVisionAttention: ReducingSmolVLMVisionAttention,
}
