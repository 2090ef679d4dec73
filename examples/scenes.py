"""Scenes of handwritten digits on a textured ground, with a class for every pixel: segmentation without downloads.

    python examples/scenes.py --output scenes/    # writes train/ and test/, each with images/ and masks/

Train scenes hold train digits only and test scenes test digits only, of the split in digits.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import load_digits
from PIL import Image
from torch import Tensor

SIDE = 64
CLASSES = ["ground", *(f"digit {i}" for i in range(10))]
CHECKPOINT = Path(__file__).with_name("scenes_vit.safetensors")
TRAIN, TEST = 600, 60
INK = 0.35  # brighter pixels belong to the digit


def draw_scene(images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One scene.

    Args:
        images: digits to draw from [N, 1, 40, 40], ink in [0, 1].
        labels: which digit each is [N].
        rng: where all randomness comes from.

    Returns:
        picture [64, 64, 3] uint8 and mask [64, 64] uint8: 0 for ground, 1 + digit for ink.
    """
    coarse = torch.rand(1, 3, 8, 8, generator=rng)
    ground = F.interpolate(coarse, SIDE, mode="bilinear", align_corners=False)[0] * 0.3
    ground = ground + 0.03 * torch.randn(3, SIDE, SIDE, generator=rng)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for _ in range(int(torch.randint(1, 4, (), generator=rng))):
        which = int(torch.randint(len(images), (), generator=rng))
        size = int(torch.randint(34, 43, (), generator=rng))
        top, left = torch.randint(0, SIDE - size + 1, (2,), generator=rng).tolist()
        ink = F.interpolate(images[which : which + 1], size, mode="bilinear", align_corners=False, antialias=True)[0, 0]
        color = 0.7 + torch.rand(3, 1, 1, generator=rng) * 0.3
        part = ground[:, top : top + size, left : left + size]
        part.copy_(part * (1 - ink) + color * ink)
        mask[top : top + size, left : left + size][ink > INK] = 1 + int(labels[which])
    return (ground.clamp(0, 1) * 255).round().byte().permute(1, 2, 0), mask


def write_scenes(folder: Path, part: str, count: int, seed: int) -> Path:
    """Writes scenes of the "train" or the "test" digits to folder/images and folder/masks."""
    digits = load_digits()
    images, labels = (getattr(digits, f"{part}_{kind}") for kind in ("images", "labels"))
    rng = torch.Generator().manual_seed(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture, mask = draw_scene(images, labels, rng)
        Image.fromarray(picture.numpy()).save(folder / "images" / f"{i:04d}.png")
        Image.fromarray(mask.numpy()).save(folder / "masks" / f"{i:04d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=TRAIN)
    parser.add_argument("--test", type=int, default=TEST)
    args = parser.parse_args()
    write_scenes(args.output / "train", "train", args.train, seed=0)
    write_scenes(args.output / "test", "test", args.test, seed=1)
    (args.output / "classes.txt").write_text("\n".join(CLASSES) + "\n")


if __name__ == "__main__":
    main()
