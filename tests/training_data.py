"""A data set of ten classes and fifty pictures, and the words that train a small model on it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SMALL = [
    "--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=32", "patch_size=8", "depth=4", "embed_dim=48",
    "num_heads=3", "--device", "cpu", "--threads", "1", "--workers", "0", "--batch-size", "10", "--lr", "2e-3",
]  # fmt: skip


def picture(label: int, generator: torch.Generator, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Noise on a colour of the class."""
    pixels = torch.randint(0, 30, (*size, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray((pixels + torch.tensor([label % 3, label // 3, label % 2], dtype=torch.uint8) * 70).numpy())


def draw(folder: Path, classes: int = 10, count: int = 5, val: int = 2) -> Path:
    """train/ and val/ with folders class_0, class_1, ..."""
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", count), ("val", val)):
        for label in range(classes):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True)
            for i in range(number):
                picture(label, generator).save(place / f"{i}.png")
    return folder


def words(data: Path, output: Path, *more: str) -> list[str]:
    """The words of a run on the small model; later ones override."""
    return [*SMALL, "--data-dir", str(data), "--output", str(output), *more]
