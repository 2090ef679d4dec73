"""Which rows of images a patched model leaves, for pictures and statistics."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.wrappers import known_of
from .family import vlm_family_of
from .passing import PROMPT, TOLD, Prompt, during


class ImageRows(NamedTuple):
    """What became of the rows of one image or video.

    Attributes:
        modality: "image" or "video".
        keep: which rows the language model sees [n] bool.
        assign: row whose place each row went to [n] int64, itself where it stays, -1 where it was dropped.
        place: (crop, row, column) of each row [n, 3] float32 on the host, in patches of the tower; the mean where a row
            is made of several, infinity for rows that always stay (new lines).
    """

    modality: str
    keep: Tensor
    assign: Tensor
    place: Tensor


@torch.no_grad()
def visual_rows(model: nn.Module, **inputs: Any) -> list[ImageRows]:
    """Which rows a selector leaves of every image of a call, images in front of videos, without the language model.

    Args:
        model: patched with a selector.
        **inputs: what the model is called with.

    Raises:
        ValueError: the model is not patched with a selector, or no image was given.
    """
    model = known_of(model)
    recipe = getattr(model, "tokenzoo_recipe", None)
    if getattr(recipe, "selector", None) is None:
        raise ValueError(f"{type(model).__name__} chooses no rows; patch it with a selector first")
    ids = inputs.get("input_ids")
    prompt = None if ids is None else Prompt(ids, inputs.get("attention_mask"))
    inner = vlm_family_of(model).inner(model)
    with during(PROMPT, prompt), during(TOLD, []) as told:
        for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if inputs.get(pixels) is not None:
                encode = getattr(inner, f"get_{modality}_features")
                names = inspect.signature(encode).parameters
                encode(**{name: value for name, value in inputs.items() if name in names})
    if not told:
        raise ValueError("no images were given; pass what the model is called with (pixel_values=...)")
    return [ImageRows(*each) for each in told]
