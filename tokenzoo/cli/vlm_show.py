"""`tokenzoo vlm show`: which patches of an image the language model sees, and until which layer, drawn over it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..view.rows import Part, draw_rows, parts_of
from ..vlm.recipe import VlmRecipe
from ..vlm.telling import dropped_rows, visual_rows
from .common import say
from .show_command import plan
from .vlm_common import add_vlm_arguments, inputs_of, load, recipes_of

HELP = "draws which patches of images a language model sees behind a selector, and behind cuts between its layers"
EXAMPLE = "tokenzoo vlm show --random tiny --method pool keep=16 --images images/ --output seen/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, --method, --images and --output."""
    add_vlm_arguments(parser)
    parser.add_argument("--images", required=True, help="an image, or a folder of them (subfolders included)")
    parser.add_argument("--output", "-o", required=True, help="file.png for one image, else a folder")


def run(args: argparse.Namespace) -> None:
    """Draws one PNG per image."""
    runs = recipes_of(args)
    if len(runs) != 1:
        raise ValueError(f"show draws one recipe, {len(runs)} were given; give one --method (a recipe.yaml holds more)")
    targets = plan(Path(args.images), Path(args.output))
    model, processor = load(args)
    ((label, method, options),) = runs
    _patch(model, method, options)
    if args.random:
        say("weights are random: the images show the selector, not a trained model")
    for source, target in targets.items():
        with Image.open(source) as file:
            image = file.convert("RGB")
        inputs = inputs_of(args, model, processor, image)
        cuts = dropped_rows(model, **inputs) if model.tokenzoo_recipe.droppers else []
        for number, told in enumerate(visual_rows(model, **inputs)):
            parts = parts_of(told.place)
            path = target if number == 0 else target.with_stem(f"{target.stem}_{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            crops = _crops(image, inputs.get("pixel_values"), number, parts)
            title = f"{args.model or args.random}, {label}: {source.name}"
            later = [(layer, left[number]) for layer, left in cuts]
            draw_rows(crops, parts, told.assign, title=title, later=later).save(path)
            say(f"{path}")


def _patch(model: nn.Module, method: Any, options: dict[str, Any]) -> None:
    """Puts the recipe on, with a selector that keeps all where it has none: that one says where rows stand."""
    from ..apply.patch import patch_model, unpatch_model

    patch_model(model, method, **options)
    recipe = model.tokenzoo_recipe
    if recipe.selector is None and recipe.droppers:
        everything = VlmRecipe.parse("uniform", keep=1.0).selector
        unpatch_model(model)
        patch_model(model, replace(recipe, selector=everything))


def _crops(image: Image.Image, pixels: Tensor | None, number: int, parts: list[Part]) -> list[Image.Image]:
    """What the tower saw of each crop; the image itself where patches come packed."""
    if pixels is None or pixels.dim() < 4:
        return [image] * len(parts)
    whole = pixels[0] if pixels.dim() == 5 else pixels[number : number + 1]
    return [_shown(whole[part.number]) for part in parts]


def _shown(x: Tensor) -> Image.Image:
    """Normalised pixels [3, H, W] as an image, from the darkest to the brightest of each channel."""
    from torchvision.transforms.functional import to_pil_image

    x = x.detach().float().cpu()
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return to_pil_image((x - low) / torch.clamp(high - low, min=1e-6))
