"""LLaVA-1.5 and VIP-LLaVA: one image, one crop, one row per patch of a CLIP or SigLIP tower."""

from __future__ import annotations

from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.models.vipllava.modeling_vipllava import VipLlavaForConditionalGeneration, VipLlavaModel

from ...adapters.hf.tower import pair
from ..family import VLMFamily, register_vlm_family
from ..head import ReducingHead
from ..model import ReducingVlm
from ..standing_in import stand_in
from ..towers import Parts, register_reader

register_reader(CLIPEncoderLayer, Parts("layer_norm1", "self_attn", "scale"))
register_reader(SiglipEncoderLayer, Parts("layer_norm1", "self_attn", "scale"))


class OneCrop(VLMFamily):
    """Families whose rows are the patches of a CLIP or SigLIP tower."""

    def has_class(self, inner: nn.Module) -> bool:
        return type(self.vision_tower(inner)).__name__ == CLIPVisionModel.__name__

    def patches(self, inner: nn.Module) -> int:
        """Patches of a crop at the tower's own size."""
        config = inner.config.vision_config
        return (pair(config.image_size)[0] // config.patch_size) * (pair(config.image_size)[1] // config.patch_size)

    def image_rows(self, inner: nn.Module) -> int:
        return self.patches(inner)

    def check(self, model: nn.Module) -> None:
        """Refuses settings that hand on other rows than one per patch.

        Raises:
            ValueError: a vision_feature_select_strategy that keeps the class token of a CLIP tower as a row, or drops a
                patch of a tower without one.
        """
        inner = self.inner(model)
        strategy = getattr(inner.config, "vision_feature_select_strategy", "default")
        wanted = "default" if self.has_class(inner) else "full"
        if strategy != wanted:
            raise ValueError(
                f"{type(model).__name__}: vision_feature_select_strategy={strategy!r} hands on another row than the "
                f"patches of a {type(self.vision_tower(inner)).__name__}; set config.vision_feature_select_strategy = "
                f"{wanted!r}"
            )


class Llava(OneCrop):
    """LLaVA-1.5 and VIP-LLaVA."""

    name = "llava"
    summary = "LLaVA-1.5, VIP-LLaVA: CLIP or SigLIP tower, Llama, Mistral or Qwen2"
    heads = {
        cls: stand_in(ReducingHead, cls, __name__)
        for cls in (LlavaForConditionalGeneration, VipLlavaForConditionalGeneration)
    }
    models = {cls: stand_in(ReducingVlm, cls, __name__) for cls in (LlavaModel, VipLlavaModel)}

    def check(self, model: nn.Module) -> None:
        if isinstance(model, LlavaForConditionalGeneration):
            super().check(model)


FAMILY = register_vlm_family(Llava())
