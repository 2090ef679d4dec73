"""The multimodal model: images are encoded as published, then a selector marks the rows that go."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Selector
from .cache import CACHE
from .choosing import choose
from .family import VLMFamily
from .passing import KWARG, PROMPT, SEEN, Note, Prompt, during
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
        if plan.selector is None:
            return encode(**given)
        whole = given.pop("return_dict", None)
        with during(SEEN, {}) as seen:
            out = encode(**given, return_dict=True)
        choose(self, plan, modality, out, seen, given)
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
            flat = isinstance(mask, Tensor) and mask.dim() == 2
            note.right = flat and bool((mask[:, -1] == 0).any())
        kept = getattr(given.get(CACHE), "kept", None)
        if kept is not None:
            length = (ids if ids is not None else given["inputs_embeds"]).shape[1]
            given["attention_mask"] = _translated(mask, kept, length)
        prompt = PROMPT.get() if ids is None else Prompt(ids, mask if isinstance(mask, Tensor) else None)
        with during(PROMPT, prompt if fed else None):
            return super().forward(**given, **{KWARG: note})

    def _visual(self, ids: Tensor | None, embeds: Tensor) -> Tensor:
        """Rows that hold placeholders [B, N] bool."""
        tokens = self.tokenzoo_plan.family.placeholders(self.config)
        if ids is not None:
            return torch.isin(ids, torch.tensor(tokens, device=ids.device))
        own = self.get_input_embeddings()(torch.tensor(tokens, device=embeds.device))
        return (embeds.unsqueeze(2) == own).all(-1).any(-1)


def _translated(mask: Any, kept: Any, length: int) -> Any:
    """A mask that counts every row ever put in, as one of the rows that are held, and of the new ones.

    Args:
        mask: the user's; those of four dimensions and None stay, unless padding was put in.
        kept: what the cache holds.
        length: new rows.

    Raises:
        ValueError: a mask of another length.
    """
    index, valid = kept.rows()
    if mask is None:
        return None if valid is None else torch.cat([valid, valid.new_ones(len(valid), length)], 1).long()
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return mask
    if mask.shape[1] != kept.length + length:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but {kept.length} rows were put in and {length} come: give "
            f"{kept.length + length} columns, one per row ever put in (dropped ones too)"
        )
    past = mask[:, : kept.length].gather(1, index)
    return torch.cat([past if valid is None else past * valid, mask[:, kept.length :]], 1)
