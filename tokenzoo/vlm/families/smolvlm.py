"""SmolVLM and Idefics3: tiles in the order of the prompts, rows of several patches by pixel shuffle."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.idefics3.modeling_idefics3 import (
    Idefics3EncoderLayer,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
)
from transformers.models.smolvlm.modeling_smolvlm import (
    SmolVLMEncoderLayer,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)

from ..family import VLMFamily, register_vlm_family
from ..head import ReducingHead
from ..model import ReducingVlm
from ..standing_in import stand_in
from ..towers import Parts, register_reader

for _layer in (Idefics3EncoderLayer, SmolVLMEncoderLayer):
    register_reader(_layer, Parts("layer_norm1", "self_attn", "scale"))


class SmolVLM(VLMFamily):
    """All tiles of a prompt are handed on as one entry; `keep` counts for each tile."""

    name = "smolvlm"
    summary = "SmolVLM, SmolVLM2, Idefics3: SigLIP tower on tiles, Llama"
    heads = {
        cls: stand_in(ReducingHead, cls, __name__)
        for cls in (SmolVLMForConditionalGeneration, Idefics3ForConditionalGeneration)
    }
    models = {cls: stand_in(ReducingVlm, cls, __name__) for cls in (SmolVLMModel, Idefics3Model)}
    tower, projector = "vision_model", "connector.modality_projection"
    tiles = True

    def language_model(self, inner: nn.Module) -> nn.Module:
        return inner.text_model

    def has_class(self, inner: nn.Module) -> bool:
        return False

    def image_rows(self, inner: nn.Module) -> int:
        config = inner.config.vision_config
        return (config.image_size // config.patch_size) ** 2 // inner.config.scale_factor**2

    def _by_prompt(self, rows: Tensor, given: dict[str, Any]) -> list[Tensor]:
        """Rows of the tiles [tiles, n, C] as those of each prompt; tiles of nothing but zeros are none."""
        real = (given["pixel_values"].flatten(2) != 0).any(-1)
        if type(self) is SmolVLM and not bool(real.any()) and len(rows):
            real[0, 0] = True  # as upstream, for a batch without an image
        return [part.flatten(0, 1) for part in rows.split(real.sum(1).tolist())]

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        scale, channels = inner.config.scale_factor, values.shape[-1]
        rows = inner.connector.pixel_shuffle(values, scale)
        return self._by_prompt(rows.unflatten(-1, (-1, channels)).mean(-2), given)

    def row_features(
        self, inner: nn.Module, modality: str, seen: dict[Any, Any], given: dict[str, Any]
    ) -> list[Tensor] | None:
        return self._by_prompt(seen["projector"][1][0], given)  # shuffled in front of the projection


FAMILY = register_vlm_family(SmolVLM())
