"""`tokenzoo show`: which patches each remaining token stands for, drawn over images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..evaluation.loading import data_config
from ..view.maps import draw_token_maps, token_maps
from .common import add_method_arguments, add_model_arguments, load_model, runs_of, say

HELP = "draws which patches each remaining token stands for, block by block, over images"
EXAMPLE = "tokenzoo show --model vit_tiny_patch16_224 --method tome r=13 --images images/ --output maps/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--images, --output, and how images are read and laid out."""
    add_model_arguments(parser)
    add_method_arguments(parser)
    parser.add_argument("--images", required=True, help="an image, or a folder of them (subfolders included)")
    parser.add_argument("--output", "-o", required=True, help="file.png for one image, else a folder")
    parser.add_argument("--mean", type=float, nargs="+", default=None, help="of the channels; the model's by default")
    parser.add_argument("--std", type=float, nargs="+", default=None)
    parser.add_argument("--columns", type=int, default=None, help="panels per row")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave unreadable images out and name them at the end"
    )


def run(args: argparse.Namespace) -> None:
    """Draws one PNG per image."""
    runs = runs_of(args)[1:]
    if len(runs) != 1:
        raise ValueError(
            f"show draws one method, {len(runs)} were given; give one --method (a recipe.yaml can hold more)"
        )
    if args.columns is not None and args.columns < 1:
        raise ValueError(f"--columns {args.columns} is not positive")
    targets = plan(Path(args.images), Path(args.output))
    model = load_model(args)
    config = data_config(model, args.img_size, mean=args.mean, std=args.std)
    model = runs[0].put_on(model)
    if not args.pretrained and not args.checkpoint and not runs[0].saved:
        say("weights are random (neither --checkpoint nor --pretrained): the maps show the method, not a trained model")
    transform, restore = _transforms(config)
    broken: list[str] = []
    for picture, target in targets.items():
        try:
            with Image.open(picture) as file:
                image = file.convert("L" if config["input_size"][0] == 1 else "RGB")
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            if not args.skip_broken:
                raise ValueError(
                    f"image {picture} cannot be read ({type(error).__name__}: {error}); repair or remove it, or "
                    "leave such files out with --skip-broken"
                ) from error
            broken.append(f"  {picture} ({type(error).__name__}: {error})")
            continue
        x = transform(image)
        maps = token_maps(model, x.unsqueeze(0).to(args.device))
        title = f"{args.model}, {runs[0].label}: {picture.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_token_maps(restore(x), maps, columns=args.columns, title=title).save(target)
        say(f"{target}")
    if broken:
        say(f"skipped {len(broken)} broken images:")
        say("\n".join(broken))
    if len(broken) == len(targets):
        raise ValueError(f"none of the {len(broken)} images in {args.images} could be read")


def plan(images: Path, output: Path) -> dict[Path, Path]:
    """The PNG to write for every image.

    Args:
        images: an image or a folder.
        output: a PNG file, or the folder for PNG files; subfolders of `images` are kept.

    Raises:
        ValueError: nothing there, no images, one file for several of them, or a PNG that would replace an image.
    """
    from timm.data import get_img_extensions

    accepted = tuple(get_img_extensions())
    if not images.exists():
        raise ValueError(f"--images {images} does not exist; give an image or a folder of images")
    pictures = [images]
    if images.is_dir():
        pictures = sorted(p for p in images.rglob("*") if p.suffix.lower() in accepted and p.is_file())
        if not pictures:
            raise ValueError(
                f"--images {images} holds no images; give a folder with files ending in {', '.join(accepted)}"
            )
    if output.suffix.lower() == ".png":
        if len(pictures) > 1:
            raise ValueError(f"--output {output} is one file, {images} holds {len(pictures)} images; give a folder")
        targets = {pictures[0]: output}
    elif output.is_file() or (output.suffix and not output.is_dir()):
        raise ValueError(f"--output {output} is neither a .png file nor a folder; maps are written as PNG")
    else:
        root = images if images.is_dir() else images.parent
        names = {p: p.relative_to(root).with_suffix(".png") for p in pictures}
        taken = list(names.values())
        # a.jpg and a.png side by side keep their whole names
        targets = {p: output / (n if taken.count(n) == 1 else f"{p.relative_to(root)}.png") for p, n in names.items()}
    originals = {p.resolve() for p in pictures}
    for target in targets.values():
        if target.resolve() in originals:
            raise ValueError(f"--output would replace the image {target}; give another folder")
    return targets


def _transforms(config: dict) -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Image.Image]]:
    """timm's transform to the model's input, and the way back from the input to an image."""
    from timm.data import create_transform
    from torchvision.transforms.functional import to_pil_image

    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return create_transform(**config), lambda x: to_pil_image((x * std + mean).clamp(0, 1))
