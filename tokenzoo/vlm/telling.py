"""Which rows of images a patched model leaves, for pictures and statistics."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.wrappers import known_of
from .family import vlm_family_of
from .passing import CUTS, PROMPT, TOLD, Prompt, during


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


@torch.no_grad()
def dropped_rows(model: nn.Module, **inputs: Any) -> list[tuple[int, list[Tensor]]]:
    """Which rows of images droppers leave, cut by cut; the language model reads the prompt for that.

    Args:
        model: patched with a selector too (one that keeps all will do), which says where rows stand.
        **inputs: what the model is called with: one prompt with images and no videos.

    Returns:
        The layer in front of which each cut is, and which rows of every image are left behind it [n] bool.

    Raises:
        ValueError: several prompts, or no selector.
    """
    ids = inputs["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{len(ids)} prompts were given; give one, whose rows are told cut by cut")
    images = visual_rows(model, **inputs)
    model = known_of(model)
    family = vlm_family_of(model)
    with during(CUTS, []) as cuts:
        model(**inputs, use_cache=False, logits_to_keep=1)
    tokens = torch.tensor(family.placeholders(family.inner(model).config), device=ids.device)
    visual = torch.isin(ids[0], tokens).nonzero().flatten()
    sizes = [len(image.keep) for image in images]
    left = torch.cat([image.keep for image in images])
    there = torch.ones_like(ids[0], dtype=torch.bool)
    there[visual] = left
    order, found = there.nonzero().flatten(), []  # rows of the prompt that entered the language model
    for layer, rows, gone in cuts:
        there[order[rows[0][gone[0]]]] = False
        found.append((layer, list(there[visual].split(sizes))))
    return found
