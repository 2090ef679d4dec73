"""Draws the token map of every method on the same three photographs, at the same share of the multiply-adds.

    python scripts/gallery.py --output build/gallery
    python scripts/gallery.py --output build/gallery --model deit_small_patch16_224 --checkpoint deit_small.safetensors

Without --model, the demo's small ViT looks at photographs that scikit-learn and scikit-image carry. Methods that it
cannot take are drawn on a Vision Mamba without training, since no trained one is at hand; the caption says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import tokenzoo
from tokenzoo.core.learned import needs_training
from tokenzoo.view.maps import TokenMaps, draw_block, draw_token_maps, token_maps
from tokenzoo.view.panels import LEGEND, compose, swatch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import photos  # noqa: E402 (the demo's model and photographs)

SHARE = 0.6
SHOWN = ("chelsea", "china", "coffee")
SIDE = 192  # pixels of the demo's input here: 24 x 24 patches
PANEL = 224
COLUMNS = 5  # panels of the image that goes block by block, the photograph's included


class Painter(NamedTuple):
    """A model, and what it sees.

    Attributes:
        model: unpatched, in eval mode.
        inputs: the photographs as it takes them [3, 3, H, W].
        views: the same to draw on.
        about: the model in a few words, for captions.
    """

    model: nn.Module
    inputs: Tensor
    views: list[Image.Image]
    about: str


class Drawn(NamedTuple):
    """What became of a method: its two images, or the reason why there is none."""

    last: str = ""
    blocks: str = ""
    about: str = ""
    tokens: str = ""
    reason: str = ""


def demo_painter() -> Painter:
    """The demo's model."""
    small = np.stack([np.asarray(photos.view(name, SIDE)) for name in SHOWN])
    views = [photos.view(name, 2 * SIDE) for name in SHOWN]
    return Painter(photos.load_classifier(SIDE), photos.normalize(small), views, "the demo's model")


def scanning_painter() -> Painter:
    """A Vision Mamba with random weights from a fixed seed."""
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", img_size=SIDE, depth=8).eval()
    small = np.stack([np.asarray(photos.view(name, SIDE)) for name in SHOWN])
    views = [photos.view(name, 2 * SIDE) for name in SHOWN]
    return Painter(model, photos.normalize(small), views, "a Vision Mamba without training")


def painter_of(name: str, checkpoint: str | None) -> Painter:
    """A model of timm, with weights of a file or the released ones."""
    from tokenzoo.serve.models import shown

    model = timm.create_model(name, pretrained=checkpoint is None, checkpoint_path=checkpoint or "").eval()
    ready = shown(model)
    inputs = torch.stack([ready.transform(photos.view(photo, 512)) for photo in SHOWN])
    return Painter(model, inputs, [ready.restore(x) for x in inputs], name)


def maps_of(painter: Painter, method: str, share: float) -> TokenMaps:
    """Maps of a method on the three photographs.

    Raises:
        ValueError, TypeError: the model cannot take it, or not at this share; or there is nothing to draw.
    """
    with tokenzoo.patched(painter.model, method, flops=share), torch.inference_mode():
        maps = token_maps(painter.model, painter.inputs)
    if not maps.blocks:
        raise ValueError(f"{method} moves values between tokens and takes none away; there is no map to draw")
    return maps


def draw(painter: Painter, method: str, share: float, folder: Path) -> Drawn:
    """Writes both images of a method: all photographs behind the last reducing block, and one block by block."""
    maps = maps_of(painter, method, share)
    last = maps.blocks[-1]
    inside = " inside the block" if last.inside else ""
    panels = [
        (draw_block(view, maps, -1, index, PANEL), name, f"{int(last.tokens_out[index])} tokens{inside}")
        for index, (name, view) in enumerate(zip(SHOWN, painter.views))
    ]
    legend = [(swatch(kind), text) for kind, text in enumerate(LEGEND)]
    first, second = f"{method}.png", f"{method}_blocks.png"
    compose(panels, legend, "", len(panels)).save(folder / first)
    count = len(maps.blocks)
    some = sorted({round((k + 1) * count / (COLUMNS - 1)) - 1 for k in range(COLUMNS - 1)} & set(range(count)))
    draw_token_maps(painter.views[0], maps, 0, len(some) + 1, PANEL, "", some).save(folder / second)
    learns = needs_training(tokenzoo.method_class(method))
    about = painter.about + (", with modules that have not learned: the mechanism, and no choice of worth" * learns)
    return Drawn(first, second, about, f"{int(last.tokens_in[0])} to {int(last.tokens_out[0])}{inside}")


def draw_all(painters: Sequence[Painter], methods: Sequence[str], share: float, folder: Path) -> dict[str, Drawn]:
    """Every method on the first model that takes it, else the reason that the first one gives."""
    found = {}
    for method in methods:
        reasons = []
        for painter in painters:
            try:
                found[method] = draw(painter, method, share, folder)
                break
            except (ValueError, TypeError) as error:
                reasons.append(str(error))
        else:
            found[method] = Drawn(reason=reasons[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the images and gallery.json")
    parser.add_argument("--model", default=None, help="a model of timm; the demo's by default")
    parser.add_argument("--checkpoint", default=None, help="its weights; those that timm releases by default")
    parser.add_argument("--method", nargs="+", default=None, help="names; all by default")
    parser.add_argument("--flops", type=float, default=SHARE, help="share of the unpatched multiply-adds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = demo_painter() if args.model is None else painter_of(args.model, args.checkpoint)
    methods = args.method or tokenzoo.list_methods()
    drawn = draw_all([chosen, scanning_painter()], methods, args.flops, args.output)
    said = {"share": args.flops, "methods": {name: entry._asdict() for name, entry in drawn.items()}}
    (args.output / "gallery.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    for name, entry in drawn.items():
        print(f"{name:<16} {entry.tokens or 'not drawn: ' + entry.reason}{' on ' + entry.about if entry.about else ''}")


if __name__ == "__main__":
    main()
