"""LLaVA-NeXT and LLaVA-OneVision: a thumbnail and crops of any resolution, laid out, unpadded, with rows for new lines.

Both pack by code of their own, which carries scores as it carries features: in one run more, whose new lines are
infinite, so that they always stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    image_size_to_num_patches,
)
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)

from ..family import register_vlm_family
from ..head import ReducingHead
from ..model import ReducingVlm
from ..standing_in import stand_in
from .llava import OneCrop


def _newline(values: Tensor) -> Tensor:
    return values.new_full((values.shape[-1],), float("inf"))


class AnyResolution(OneCrop):
    """Families of a thumbnail and crops."""

    def crop_counts(self, inner: nn.Module, given: dict[str, Any]) -> list[int]:
        """Passes of the tower that each image takes."""
        side, pinpoints = inner.config.vision_config.image_size, inner.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in given["image_sizes"]]

    def fixed_rows(self, inner: nn.Module) -> int | None:
        return None

    def crops(self, inner: nn.Module, rows: Sequence[int]) -> int:
        return sum(-(-n // self.patches(inner)) for n in rows)


class LlavaNext(AnyResolution):
    """LLaVA-NeXT (1.6)."""

    name = "llava_next"
    summary = "LLaVA-NeXT (1.6): CLIP or SigLIP tower on a thumbnail and crops, Llama, Mistral or Qwen2"
    heads = {LlavaNextForConditionalGeneration: stand_in(ReducingHead, LlavaNextForConditionalGeneration, __name__)}
    models = {LlavaNextModel: stand_in(ReducingVlm, LlavaNextModel, __name__)}

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        return inner.pack_image_features(
            torch.split(values, self.crop_counts(inner, given)),
            given["image_sizes"],
            vision_feature_select_strategy=inner.config.vision_feature_select_strategy,
            image_newline=_newline(values),
        )[0]


class LlavaOnevision(AnyResolution):
    """LLaVA-OneVision: crops are shrunk where they are many; frames of videos are halved, one new line behind them."""

    name = "llava_onevision"
    summary = "LLaVA-OneVision: SigLIP tower on a thumbnail and crops, or on frames of videos, Qwen2"
    heads = {
        LlavaOnevisionForConditionalGeneration: stand_in(ReducingHead, LlavaOnevisionForConditionalGeneration, __name__)
    }
    models = {LlavaOnevisionModel: stand_in(ReducingVlm, LlavaOnevisionModel, __name__)}
    modalities = ("image", "video")
    one_to_one = False  # rows are shrunk behind the projector

    def crop_counts(self, inner: nn.Module, given: dict[str, Any]) -> list[int]:
        counts, several = super().crop_counts(inner, given), given.get("batch_num_images")
        if several is None:
            return counts
        # images of a prompt with more than one are not cut into crops
        alone = [count == 1 for count in several.tolist() for _ in range(count)]
        return [count if one else 1 for count, one in zip(counts, alone)]

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        if modality == "video":
            videos, frames = given["pixel_values_videos"].shape[:2]
            rows = inner.apply_pooling(values).reshape(videos, -1, values.shape[-1])
            return list(torch.cat([rows, _newline(values).expand(videos, 1, -1)], 1))
        ratio = given.get("vision_aspect_ratio") or inner.config.vision_aspect_ratio
        return inner.pack_image_features(
            torch.split(values, self.crop_counts(inner, given)),
            given["image_sizes"],
            image_newline=_newline(values),
            vision_aspect_ratio=ratio,
        )[0]


NEXT = register_vlm_family(LlavaNext())
ONEVISION = register_vlm_family(LlavaOnevision())
