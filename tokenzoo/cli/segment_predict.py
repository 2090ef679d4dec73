"""`tokenzoo segment predict`: class maps of images as PNGs, and what a method changes about them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..apply.patch import patch_model
from ..dense.segmenter import pad_to_patches
from ..evaluation.runs import shared_copy
from ..evaluation.segmentation.inference import Predictor
from ..evaluation.segmentation.overlay import (
    class_colours,
    differences,
    overlay,
    save_indices,
    side_by_side,
    with_legend,
)
from ..view.maps import group_picture, token_maps
from .common import add_method_arguments, runs_of, say
from .segment_common import add_checkpoint_arguments, add_inference_arguments, inference_of, load_checkpoint

HELP = "class maps of an image or a folder as overlays and index PNGs"
EXAMPLE = (
    "tokenzoo segment predict --checkpoint model.safetensors --input images/ --output out/ --method algm --compare"
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, inference, images."""
    add_checkpoint_arguments(parser)
    add_method_arguments(parser)
    add_inference_arguments(parser)
    parser.add_argument("--input", required=True, help="image, or folder of images")
    parser.add_argument("--output", required=True, help="folder for NAME.index.png, NAME.overlay.png, NAME.compare.png")
    parser.add_argument("--compare", action="store_true", help="unpatched | patched | where they differ | clusters")
    parser.add_argument("--skip-broken", action="store_true", help="leave unreadable images out and name them")


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Writes the images."""
    runs, output = runs_of(args)[1:], Path(args.output)
    if len(runs) > 1:
        raise ValueError(f"{len(runs)} methods are given; predict takes one --method (a recipe file may hold several)")
    if args.compare and not runs:
        raise ValueError("--compare needs a --method to compare the unpatched model with")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder")
    paths = _pictures(Path(args.input))
    if output.resolve() == paths[0].parent.resolve():
        raise ValueError(f"--output {output} is where the images are; give another folder")
    model = load_checkpoint(args)
    inference = inference_of(args, model, "folder")
    plain = reduced = Predictor(model, model.mean, model.std, inference, args.device)
    if runs:  # two models on the same weights
        own = patch_model(shared_copy(model), runs[0].recipe(), flops=runs[0].flops)
        reduced = Predictor(own, model.mean, model.std, inference, args.device)
    palette = class_colours(model.num_classes, model.classes)
    classes = model.classes or [f"class {i}" for i in range(model.num_classes)]
    output.mkdir(parents=True, exist_ok=True)
    skipped = 0
    for path in paths:
        try:
            picture = _opened(path)
        except ValueError as error:
            if not args.skip_broken:
                raise ValueError(f"{error}; --skip-broken goes on without it") from error
            say(f"left out: {error}")
            skipped += 1
            continue
        labels = _labels(reduced, picture, path)
        save_indices(labels, output / f"{path.stem}.index.png", palette)
        drawn = with_legend(overlay(picture, labels, palette), labels, palette, classes)
        drawn.save(output / f"{path.stem}.overlay.png")
        if args.compare:
            before = _labels(plain, picture, path)
            share = float((before != labels).mean())
            panel = side_by_side(
                [overlay(picture, before, palette), overlay(picture, labels, palette),
                 differences(picture, before, labels, palette), _clusters(reduced, picture)],
                ["unpatched", runs[0].label, f"where they differ: {share:.1%} of the pixels", "patches of one token"],
            )  # fmt: skip
            panel = with_legend(panel, np.concatenate([before, labels]), palette, classes)
            panel.save(output / f"{path.stem}.compare.png")
    if skipped == len(paths):
        raise ValueError(f"none of the {skipped} images of --input {args.input} can be read")
    say(f"wrote {len(paths) - skipped} class maps to {output}" + (f", left out {skipped}" if skipped else ""))


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            mode, picture = file.mode, file.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        unknown = isinstance(error, UnidentifiedImageError)  # its text repeats the path
        reason = "not in a format that Pillow knows" if unknown else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable image ({reason})") from error
    if mode.startswith(("I", "F")):  # Pillow cuts these off at 255, which leaves 16-bit images white
        raise ValueError(f"{path} holds pixels of more than 8 bits (Pillow's mode {mode}); convert it to 8 bits")
    return picture


def _labels(predict: Predictor, picture: Image.Image, path: Path) -> np.ndarray:
    labels, finite = predict(picture)
    if not finite:
        say(f"{path}: some class scores are infinite or no numbers, the class map is not to be trusted")
    return labels


def _pictures(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(p for p in source.glob("*") if p.suffix.lower() in SUFFIXES) if source.is_dir() else []
    if not found:
        raise ValueError(f"--input {source} holds no images ({', '.join(SUFFIXES)})")
    stems = [path.stem for path in found]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise ValueError(f"--input {source} holds two images called {twice}; their results would overwrite each other")
    return found


def _clusters(predict: Predictor, picture: Image.Image) -> Image.Image:
    """Which patches share a token at the end of the encoder, drawn over the image (as one whole image)."""
    pixels = predict.inference.resized(picture)
    high, wide = pixels.shape[-2:]
    patch = predict.model.tokenzoo_backbone.patch_embed.patch_size
    # filled up to whole patches as the model does it, so that the clusters are those of the class map
    image, (top, left) = pad_to_patches(predict.normalised(pixels), patch, getattr(predict.model, "pad", "right"))
    maps = token_maps(predict.model, image)
    shown = np.zeros((*image.shape[-2:], 3), dtype=np.uint8)
    shown[top : top + high, left : left + wide] = pixels[0].permute(1, 2, 0).numpy()
    assign = maps.blocks[-1].assign[0].cpu() if maps.blocks else torch.arange(maps.grid[0] * maps.grid[1])
    size = shown.shape[1], shown.shape[0]
    # where patches overlap, the image is not a whole number of tokens
    whole = tuple(-(-pixels // tokens) * tokens for pixels, tokens in zip(size, reversed(maps.grid)))
    cells = np.asarray(Image.fromarray(shown).resize(whole))
    drawn = Image.fromarray(group_picture(cells, assign, maps.grid)).resize(size)
    drawn = drawn.crop((left, top, left + wide, top + high))
    return drawn if drawn.size == picture.size else drawn.resize(picture.size, Image.Resampling.LANCZOS)
