"""Token maps over photographs: every method on a few of them, block by block, and all methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import photos
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenzoo
from tokenzoo.view.maps import TokenMaps, draw_block, draw_token_maps, token_maps
from tokenzoo.view.panels import LEGEND, compose, swatch

SIDE = 192  # of the model's input: 24 x 24 patches, so that a patch shows what one of the training crops did
SHARE = 0.6  # of the multiply-adds
SHOWN = ("chelsea", "china", "coffee")
BLOCKS = 3  # panels beside the photograph


def maps_of(model: VisionTransformer, method: str, images: Tensor) -> tuple[TokenMaps, list[str]]:
    """Maps of a method at 60 % of the multiply-adds, and which photographs the patched model took them for."""
    with tokenzoo.patched(model, method, flops=SHARE), torch.inference_mode():
        return token_maps(model, images), [photos.CLASSES[i] for i in model(images).argmax(1).tolist()]


def some_blocks(maps: TokenMaps) -> list[int]:
    """The last reducing block and a few before it, evenly."""
    count = len(maps.blocks)
    return sorted({round((k + 1) * count / BLOCKS) - 1 for k in range(BLOCKS)} & set(range(count)))


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Images one below the other."""
    canvas = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    return canvas


def run(output: Path, methods: Sequence[str]) -> tuple[dict[str, Path], list[Path]]:
    """Draws all methods.

    Args:
        output: folder.
        methods: names; those that cannot reach the cost at this size are named and left out.

    Returns:
        The image of every method, and all that was written, the overview first.
    """
    model = photos.load_classifier(SIDE)
    views = [photos.view(name, 2 * SIDE) for name in SHOWN]
    small = [photos.view(name, SIDE) for name in SHOWN]
    images = photos.normalize(np.stack([np.asarray(image) for image in small]))
    drawn: dict[str, Path] = {}
    panels = [(views[0].resize((168, 168), Image.Resampling.BICUBIC), "the photograph", "577 tokens")]
    for method in methods:
        try:
            maps, answers = maps_of(model, method, images)
        except ValueError as error:
            print(f"no token maps: {method} at {SHARE:.0%}: {str(error).partition(';')[0]}", flush=True)
            continue
        if not maps.blocks:
            print(f"no token maps: {method} moves values between tokens and takes none away", flush=True)
            continue
        rows, shown = [], some_blocks(maps)
        for index, (name, image) in enumerate(zip(SHOWN, views)):
            title = f"{method}, flops={SHARE}: {name}, read as {answers[index]}"
            rows.append(draw_token_maps(image, maps, index, BLOCKS + 1, 216, title, shown))
        drawn[method] = output / f"token_maps_{method}.png"
        stacked(rows).save(drawn[method])
        last = maps.blocks[-1]
        count = f"{int(last.tokens_out[0])} tokens{' inside' if last.inside else ''}"
        panels.append((draw_block(views[0], maps, -1, 0, 168), method, count))
    overview = output / "token_maps.png"
    legend = [(swatch(kind), text) for kind, text in enumerate(LEGEND)]
    compose(panels, legend, f"after the last reducing block, flops={SHARE}", 6).save(overview)
    return drawn, [overview, *drawn.values()]
