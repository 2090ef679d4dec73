"""InternVL3: tiles of one size, rows of 2 x 2 patches by pixel shuffle, a class token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import (
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionLayer,
)

from ...adapters.hf.tower import pair
from ..family import VLMFamily, register_vlm_family
from ..head import ReducingHead
from ..model import ReducingVlm
from ..standing_in import stand_in
from ..towers import Parts, register_reader

register_reader(InternVLVisionLayer, Parts("layernorm_before", "attention", "scale"))


class InternVL(VLMFamily):
    """Each tile is handed on as an image; a budget per prompt is `keep_total`."""

    name = "internvl"
    summary = "InternVL 2.5 to 3.5 (transformers' own): InternViT on tiles, Qwen2, Qwen3 or Llama"
    heads = {InternVLForConditionalGeneration: stand_in(ReducingHead, InternVLForConditionalGeneration, __name__)}
    models = {InternVLModel: stand_in(ReducingVlm, InternVLModel, __name__)}

    def tower_layers(self, inner: nn.Module) -> Sequence[nn.Module]:
        return inner.vision_tower.encoder.layer

    def image_rows(self, inner: nn.Module) -> int:
        config, ratio = inner.config.vision_config, inner.config.downsample_ratio
        sides = zip(pair(config.image_size), pair(config.patch_size))
        high, wide = (int(size // patch * ratio) for size, patch in sides)
        return high * wide

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        tiles, n, channels = values.shape
        side, ratio = round(n**0.5), inner.config.downsample_ratio
        rows = inner.pixel_shuffle(values.reshape(tiles, side, side, channels), scale_factor=ratio).flatten(1, 2)
        return list(rows.unflatten(-1, (-1, channels)).mean(-2))

    def row_features(
        self, inner: nn.Module, modality: str, seen: dict[Any, Any], given: dict[str, Any]
    ) -> list[Tensor] | None:
        return list(seen["projector"][1][0])  # shuffled in front of the projector


FAMILY = register_vlm_family(InternVL())
