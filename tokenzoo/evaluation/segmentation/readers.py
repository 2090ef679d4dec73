"""Which image belongs to which mask, in the ways that segmentation data sets are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from .files import Files

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
# the classes of Cityscapes that count, by labelId
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Pair(NamedTuple):
    """An image and its mask.

    Attributes:
        name: what the image is called in results.
        image: file below the root.
        mask: file below the root; None where there is none.
        table: the class of every value of the mask [256] uint8, None for the values themselves.
    """

    name: str
    image: str
    mask: str | None
    table: np.ndarray | None = None


def _stem(name: str, below: str) -> str:
    return str(PurePosixPath(name).relative_to(below).with_suffix(""))


def _pictures(files: Files, below: str, suffix: str = "") -> list[str]:
    return [n for n in files.names(below) if n.lower().endswith(suffix or PICTURES) and not _hidden(n)]


def _hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".") or name.startswith("__MACOSX")


def parallel(images: str, masks: str, suffix: str = ".png") -> Callable[[Files, str, str], list[Pair]]:
    """Images below one folder, masks of the same stem below another."""

    def pairs(files: Files, base: str, split: str) -> list[Pair]:
        images_at, masks_at = (base + folder.format(split).rstrip("/") for folder in (images, masks))
        there = set(files.names(masks_at))
        found = []
        for image in _pictures(files, images_at):
            name = _stem(image, images_at)
            mask = f"{masks_at}/{name}{suffix}"
            found.append(Pair(name, image, mask if mask in there else None))
        return found

    return pairs


def plain_folder(files: Files, base: str, split: str) -> list[Pair]:
    # <root>/<split>/images or <root>/images/<split>, and without splits <root>/images
    nested = not split or files.is_dir(f"{split}/images")
    shape = ("{}/images", "{}/masks") if split and nested else ("images/{}", "masks/{}")
    return parallel(*shape)(files, base, split)


def cityscapes(files: Files, base: str, split: str) -> list[Pair]:
    table = np.full(256, 255, np.uint8)
    table[list(_CITYSCAPES_IDS)] = np.arange(len(_CITYSCAPES_IDS))
    images_at, masks_at = f"{base}leftImg8bit/{split}", f"{base}gtFine/{split}"
    there = set(files.names(masks_at))
    found = []
    for image in _pictures(files, images_at, "_leftimg8bit.png"):
        name = _stem(image, images_at)[: -len("_leftImg8bit")]
        train, ids = (f"{masks_at}/{name}_gtFine_{what}.png" for what in ("labelTrainIds", "labelIds"))
        mask = train if train in there else ids if ids in there else None
        found.append(Pair(name, image, mask, table if mask == ids else None))
    return found


def listed(
    folder: str, list_file: str, images: str, masks: str, suffix: str
) -> Callable[[Files, str, str], list[Pair]]:
    """Images named in a text file, one stem per line."""

    def pairs(files: Files, base: str, split: str) -> list[Pair]:
        names_at, images_at, masks_at = base + folder, base + images.format(split), base + masks.format(split)
        listing = f"{names_at}/{list_file.format(split)}"
        if listing not in set(files.names(names_at)):
            raise ValueError(f"{files} holds no {listing}, the list of images of the split; fetch it with the data set")
        stems = [line.split()[0] for line in files.read(listing).decode("utf-8").splitlines() if line.strip()]
        there = set(files.names(masks_at))
        masks_of = {stem: f"{masks_at}/{stem}{suffix}" for stem in stems}
        return [Pair(s, f"{images_at}/{s}.jpg", masks_of[s] if masks_of[s] in there else None) for s in stems]

    return pairs
