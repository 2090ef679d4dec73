"""PaliGemma, PaliGemma 2 and Gemma 3: rows of an image see each other, in masks that the multimodal model builds.

Sliding layers of a prompt that is longer than their window count the rows that are left; droppers are refused there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration, Gemma3Model
from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration, PaliGemmaModel

from ..family import register_vlm_family
from ..head import ReducingHead
from ..model import ReducingVlm
from ..standing_in import stand_in
from .llava import OneCrop


class PaliGemma(OneCrop):
    """One row per patch of a SigLIP tower."""

    name = "paligemma"
    summary = "PaliGemma, PaliGemma 2: SigLIP tower, Gemma or Gemma 2"
    heads = {PaliGemmaForConditionalGeneration: stand_in(ReducingHead, PaliGemmaForConditionalGeneration, __name__)}
    models = {PaliGemmaModel: stand_in(ReducingVlm, PaliGemmaModel, __name__)}
    builds_masks = True

    def has_class(self, inner: nn.Module) -> bool:
        return False

    def check(self, model: nn.Module) -> None:
        """Nothing is left to settings."""


class Gemma3(PaliGemma):
    """Rows are means of several patches."""

    name = "gemma3"
    summary = "Gemma 3: SigLIP tower, rows pooled, Gemma 3 with sliding layers"
    heads = {Gemma3ForConditionalGeneration: stand_in(ReducingHead, Gemma3ForConditionalGeneration, __name__)}
    models = {Gemma3Model: stand_in(ReducingVlm, Gemma3Model, __name__)}
    one_to_one = False

    def image_rows(self, inner: nn.Module) -> int:
        return inner.config.mm_tokens_per_image

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        crops, n, channels = values.shape
        side = round(n**0.5)
        grid = values.transpose(1, 2).reshape(crops, channels, side, side)
        return list(inner.multi_modal_projector.avg_pool(grid).flatten(2).transpose(1, 2))


FAMILIES = [register_vlm_family(PaliGemma()), register_vlm_family(Gemma3())]
