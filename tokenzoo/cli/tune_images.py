"""The images of `tokenzoo tune`: a seeded draw of a folder, with labels or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..evaluation.data import Pictures, PictureStream
from ..evaluation.loading import PictureLoader


class Files:
    """Images of a folder and its subfolders, without labels; a source of `Pictures`.

    Raises:
        ValueError: nothing there.
    """

    def __init__(self, folder: str | Path) -> None:
        from timm.data import get_img_extensions

        accepted = tuple(get_img_extensions())
        if not Path(folder).is_dir():
            raise ValueError(f"--data-dir {folder} is not a folder; give a folder of images")
        found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in accepted and p.is_file())
        if not found:
            raise ValueError(f"--data-dir {folder} holds no images; give files ending in {', '.join(accepted)}")
        self.samples = [(path, None) for path in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, None]:
        with Image.open(self.samples[index][0]) as image:
            image.load()
            return image, None


class Drawn(Dataset):
    """Some items of `Pictures`.

    Args:
        pictures: all of them.
        indices: which.
    """

    def __init__(self, pictures: Pictures, indices: list[int]) -> None:
        self.pictures, self.indices = pictures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.pictures[self.indices[index]]

    @property
    def transform(self) -> Any:
        """That of the pictures."""
        return self.pictures.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.pictures.transform = transform


def load_images(
    pictures: Pictures | PictureStream,
    config: dict[str, Any],
    most: int,
    seed: int,
    batch_size: int,
    workers: int,
    skip_broken: bool,
) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] and their class indices [N], a draw of all (the first ones of a stream).

    Args:
        pictures: from `open_pictures`, or of `Files`.
        config: from `data_config`.
        most: images at most.
        seed: of the draw.
        batch_size: images read together.
        workers: processes that decode.
        skip_broken: leave broken images out.

    Raises:
        ValueError: a number of images below one, or an image that cannot be read.
    """
    if most < 1:
        raise ValueError(f"--max-images {most} is not positive")
    if isinstance(pictures, Pictures) and len(pictures) > most:
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
        pictures = Drawn(pictures, sorted(order[:most].tolist()))
    images, targets, count = [], [], 0
    for batch, labels in PictureLoader(pictures, config, batch_size, workers, skip_broken):
        images.append(batch)
        targets.append(labels)
        count += len(labels)
        if count >= most:
            break
    if not images:
        raise ValueError("there are no images that can be read; give a folder with at least some")
    return torch.cat(images)[:most], torch.cat(targets)[:most]
