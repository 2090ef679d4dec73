"""The multimodal model: images are encoded as published, then a selector marks the rows that go."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Selector
from .cache import CACHE
from .choosing import choose
from .family import VLMFamily
from .lm import translated
from .passing import KWARG, PROMPT, SEEN, Note, Prompt, during
from .reading import in_place
from .standing_in import named

_PIXELS = ("pixel_values", "pixel_values_videos")


class VlmPlan(NamedTuple):
    """What the multimodal model does.

    Attributes:
        family: the family that serves it.
        selector: None where rows are dropped in the tower or in the language model alone.
    """

    family: VLMFamily
    selector: Selector | None


class ReducingVlm:
    """Mixin of multimodal models without a head; upstream's own `forward` joins images and words."""

    tokenzoo_plan: VlmPlan

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoded("image", super().get_image_features, args, kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoded("video", super().get_video_features, args, kwargs)

    def _encoded(self, modality: str, encode: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What upstream gives, with rows that go marked."""
        given, plan = named(encode, args, kwargs), self.tokenzoo_plan
        given = {name: value for name, value in given.items() if name != KWARG}
        if plan.selector is None or SEEN.get() is not None:  # frames may be encoded as images are
            return encode(**given)
        whole = given.pop("return_dict", None)
        with during(SEEN, {}) as seen:
            out = encode(**given, return_dict=True)
        choose(self, plan, modality, out, in_place(plan.family.vision_tower(self), seen), given)
        return out.to_tuple() if whole is False else out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = named(super().forward, args, kwargs)
        note: Note = given.pop(KWARG, None) or Note()
        if CACHE == "cache" and "past_key_values" in given:
            given[CACHE] = given.pop("past_key_values")
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        # only where images come in: a language model may make up the id of a placeholder itself
        fed = any(given.get(name) is not None for name in _PIXELS) or bool(given.get("mm_encoder_outputs"))
        if fed:
            note.visual = self._visual(ids, given.get("inputs_embeds"))
            if isinstance(mask, Tensor) and mask.dim() == 2:
                note.right = bool((mask[:, -1] == 0).any())
                note.padding = mask[:, -note.visual.shape[1] :] == 0
        kept = getattr(given.get(CACHE), "kept", None)
        if kept is not None and self.tokenzoo_plan.family.builds_masks:
            length = (ids if ids is not None else given["inputs_embeds"]).shape[1]
            given["attention_mask"] = translated(mask, given[CACHE], length)
        if not fed:
            return super().forward(**given, **{KWARG: note})
        prompt = PROMPT.get() if ids is None else Prompt(ids, mask if isinstance(mask, Tensor) else None)
        with during(PROMPT, prompt):
            return super().forward(**given, **{KWARG: note})

    def _visual(self, ids: Tensor | None, embeds: Tensor) -> Tensor:
        """Rows that hold placeholders [B, N] bool."""
        tokens = self.tokenzoo_plan.family.placeholders(self.config)
        if ids is not None:
            return torch.isin(ids, torch.tensor(tokens, device=ids.device))
        own = self.get_input_embeddings()(torch.tensor(tokens, device=embeds.device))
        return (embeds.unsqueeze(2) == own).all(-1).any(-1)
