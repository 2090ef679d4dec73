"""Class maps as pictures: index PNGs, colour overlays with a legend, and panels side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .classes import colours
from .kinds import KINDS

_LINE = 16  # pixels of a line of text
_GAP = 8


def class_colours(count: int, classes: Sequence[str] | None = None) -> np.ndarray:
    """A colour for each of `count` classes [count, 3] uint8, always the same ones.

    Args:
        count: how many, at most 255.
        classes: their names; those of a known data set get its colours. Others get no black, which is for a background.
    """
    known = next((kind for kind in KINDS.values() if kind.classes and kind.classes == tuple(classes or ())), None)
    if known is not None and (known.palette or known.background):
        return np.array(known.palette or colours(count), dtype=np.uint8)
    return np.array(colours(count + 1)[1:], dtype=np.uint8)


def save_indices(labels: np.ndarray, path: Path, palette: np.ndarray) -> None:
    """Writes classes [H, W] uint8 as an 8-bit PNG whose values are the classes; viewers show the palette."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette.reshape(-1).tolist())
    picture.save(path)


def overlay(picture: Image.Image, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.55) -> Image.Image:
    """The picture under the colours of its classes.

    Args:
        picture: RGB.
        labels: classes of its pixels [H, W].
        palette: colours [K, 3] uint8.
        alpha: weight of the colours.
    """
    mixed = (1 - alpha) * np.asarray(picture, dtype=np.float32) + alpha * palette[labels].astype(np.float32)
    return Image.fromarray(mixed.round().astype(np.uint8))


def differences(picture: Image.Image, first: np.ndarray, second: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The picture in grey, with the second class map's colours where it differs from the first."""
    grey = np.repeat(np.asarray(picture.convert("L"), dtype=np.uint8)[..., None], 3, axis=2) // 2 + 64
    return Image.fromarray(np.where((first != second)[..., None], palette[second], grey).astype(np.uint8))


def with_legend(picture: Image.Image, labels: np.ndarray, palette: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """The picture with the classes that occur named below it; wider than the picture where a name needs it."""
    font, rows, x, needed = ImageFont.load_default(), [[]], _GAP, picture.width
    for index in np.unique(labels).tolist():
        width = _LINE + int(font.getlength(classes[index])) + 2 * _GAP
        needed = max(needed, width)
        if x + width > picture.width and rows[-1]:
            rows.append([])
            x = _GAP
        rows[-1].append((x, index))
        x += width
    canvas = Image.new("RGB", (needed, picture.height + _LINE * len(rows) + _GAP), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for line, row in enumerate(rows):
        top = picture.height + _GAP // 2 + line * _LINE
        for x, index in row:
            draw.rectangle((x, top + 2, x + 11, top + 13), fill=tuple(palette[index].tolist()), outline="black")
            draw.text((x + _LINE, top + 1), classes[index], fill="black", font=font)
    return canvas


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures of one size in a row, each with a title above it; long titles move the pictures apart."""
    font, (wide, high) = ImageFont.load_default(), pictures[0].size
    step = max(wide, *(int(font.getlength(title)) + 1 for title in titles)) + _GAP
    canvas = Image.new("RGB", (len(pictures) * step - _GAP, high + _LINE + 4), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, title) in enumerate(zip(pictures, titles)):
        draw.text((i * step, 2), title, fill="black", font=font)
        canvas.paste(picture, (i * step, _LINE + 4))
    return canvas
