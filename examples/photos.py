"""The demo's data and model: photographs that scikit-learn and scikit-image carry, and a small ViT trained on them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokenzoo.dense import Segmenter, create_segmenter
from tokenzoo.serve.demo import ARCHITECTURE, CHECKPOINT, CLASSES, SIDE, load_demo

SHORT = 320  # short side of the photographs, pixels
TILES = 4  # along either axis; a photograph has this many test tiles
MEAN = STD = (0.5, 0.5, 0.5)
# name, library that carries the file, terms; more of these in docs/demo.md
PHOTOS = (
    ("china", "sklearn", "CC BY, danielbuechele"),
    ("flower", "sklearn", "CC BY, vultilion"),
    ("astronaut", "skimage", "public domain, NASA"),
    ("chelsea", "skimage", "CC0, S. van der Walt"),
    ("coffee", "skimage", "CC0, Rachel Michetti"),
    ("rocket", "skimage", "public domain, SpaceX"),
    ("camera", "skimage", "CC0, Lav Varshney"),
    ("hubble", "skimage", "public domain, NASA"),
    ("coins", "skimage", "Brooklyn Museum"),
    ("brick", "skimage", "CC0, CC0Textures"),
    ("grass", "skimage", "CC0, linolafett"),
    ("gravel", "skimage", "CC0, CC0Textures"),
)


class Box(NamedTuple):
    """Part of a photograph in pixels, ends excluded."""

    left: int
    top: int
    right: int
    bottom: int

    def meets(self, other: Box) -> bool:
        """Whether the two have a pixel in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def _read(name: str, library: str) -> Image.Image:
    if library == "sklearn":
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    from skimage import data

    pixels = data.hubble_deep_field() if name == "hubble" else getattr(data, name)()
    return Image.fromarray(pixels).convert("RGB")


@lru_cache(maxsize=1)
def load_photos() -> tuple[Image.Image, ...]:
    """All photographs in the order of `CLASSES`, RGB, their short sides 320 pixels."""
    found = []
    for name, library, _ in PHOTOS:
        photo = _read(name, library)
        scale = SHORT / min(photo.size)
        size = tuple(round(side * scale) for side in photo.size)
        found.append(photo.resize(size, Image.Resampling.BICUBIC))
    return tuple(found)


def test_tiles(index: int, size: tuple[int, int]) -> list[Box]:
    """The tiles of a photograph that are for testing: one in every row and every column of the grid of tiles.

    Args:
        index: of the photograph, which shifts them.
        size: width and height, pixels.
    """
    columns = [(2 * row + row // 2 + index) % TILES for row in range(TILES)]
    steps = [[side * k // TILES for k in range(TILES + 1)] for side in size]
    return [Box(steps[0][c], steps[1][r], steps[0][c + 1], steps[1][r + 1]) for r, c in enumerate(columns)]


def draw_box(index: int, part: str, rng: np.random.Generator) -> Box:
    """A square of a photograph: inside a test tile for "test", without a pixel of any for "train"."""
    size = load_photos()[index].size
    tiles = test_tiles(index, size)
    if part == "test":
        tile = tiles[rng.integers(TILES)]
        side = int(rng.integers(64, min(tile.right - tile.left, tile.bottom - tile.top) + 1))
        left, top = (int(rng.integers(a, b - side + 1)) for a, b in ((tile.left, tile.right), (tile.top, tile.bottom)))
        return Box(left, top, left + side, top + side)
    while True:
        side = int(rng.integers(48, 129))
        left, top = (int(rng.integers(0, length - side + 1)) for length in size)
        box = Box(left, top, left + side, top + side)
        if not any(box.meets(tile) for tile in tiles):
            return box


def draw_crop(index: int, part: str, rng: np.random.Generator) -> np.ndarray:
    """A crop of a photograph as the model sees it [96, 96, 3] uint8."""
    box = draw_box(index, part, rng)
    return np.asarray(load_photos()[index].resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


def draw_mosaic(part: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crops of three to five photographs, parted by straight lines: each place shows the nearest of random points.

    Returns:
        Pixels [96, 96, 3] uint8 and the photograph that each comes from [96, 96] uint8.
    """
    count = int(rng.integers(3, 6))
    chosen = rng.permutation(len(PHOTOS))[:count]
    points = rng.uniform(0, SIDE, (count, 2))
    places = np.stack(np.mgrid[:SIDE, :SIDE], -1) + 0.5
    owner = ((places[:, :, None] - points) ** 2).sum(-1).argmin(-1)
    crops = np.stack([draw_crop(int(index), part, rng) for index in chosen])
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return crops[owner, rows, columns], chosen[owner].astype(np.uint8)


def normalize(pixels: np.ndarray | Tensor) -> Tensor:
    """Pixels [B, H, W, 3] uint8 to the model's input [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class Crops(NamedTuple):
    """Crops [N, 96, 96, 3] uint8, and the photographs that they come from [N] int64."""

    pixels: Tensor
    labels: Tensor


def draw_crops(count: int, part: str, seed: int) -> Crops:
    """As many crops of every photograph as of any other."""
    rng = np.random.default_rng(seed)
    labels = [index % len(PHOTOS) for index in range(count)]
    return Crops(torch.as_tensor(np.stack([draw_crop(i, part, rng) for i in labels])), torch.tensor(labels))


def write_mosaics(folder: Path, count: int, part: str, seed: int) -> Path:
    """Mosaics as images/ and masks/ of a segmentation data set; returns its folder."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels, mask = draw_mosaic(part, rng)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:03d}.png")
    return folder


def view(name: str, side: int) -> Image.Image:
    """The middle square of a photograph."""
    photo = load_photos()[CLASSES.index(name)]
    short = min(photo.size)
    left, top = (photo.width - short) // 2, (photo.height - short) // 2
    return photo.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + short, top + short))


# ---- the model


def new_segmenter() -> Segmenter:
    """Encoder and linear head of the mosaics, untrained."""
    return create_segmenter(
        "vit_tiny_patch16_224", len(PHOTOS), "linear", ARCHITECTURE, classes=list(CLASSES), mean=MEAN, std=STD
    )


def new_classifier(side: int = SIDE) -> VisionTransformer:
    """The same encoder with a head for whole crops, for images of any side that is a multiple of 8 pixels."""
    return VisionTransformer(**{**ARCHITECTURE, "img_size": side}, num_classes=len(PHOTOS))


def save_checkpoint(weights: dict[str, Tensor], about: dict[str, Any], path: Path = CHECKPOINT) -> None:
    """Writes weights in half precision ("encoder.", "decoder.", "head."), what is known about them in the header."""
    halves = {name: value.half().contiguous() for name, value in weights.items()}
    save_file(halves, path, metadata={"about": json.dumps(about, sort_keys=True)})


def load_about(path: Path = CHECKPOINT) -> dict[str, Any]:
    """What the file says about its weights."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])


def load_classifier(side: int = SIDE, path: Path = CHECKPOINT) -> VisionTransformer:
    """The reader of crops in float32 and eval mode; positions are resampled for another side."""
    return load_demo(side, path)


def load_mosaic_model(path: Path = CHECKPOINT) -> Segmenter:
    """The segmentation model in float32 and eval mode."""
    weights = {name: value.float() for name, value in load_file(path).items() if not name.startswith("head.")}
    model = new_segmenter()
    model.load_state_dict(weights)
    return model.eval()


@torch.inference_mode()
def accuracy(model: VisionTransformer, crops: Crops) -> float:
    """Share of crops whose photograph is named."""
    parts = zip(crops.pixels.split(60), crops.labels.split(60))
    return sum((model(normalize(x)).argmax(1) == y).sum().item() for x, y in parts) / len(crops.labels)


def mosaic_loss(model: Segmenter, pixels: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of every pixel."""
    return F.cross_entropy(model(normalize(pixels)), masks.long())
