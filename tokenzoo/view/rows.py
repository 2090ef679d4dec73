"""Images of the rows that a language model sees: which patches stay, and which went together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .panels import LEGEND, compose, paint, patch_kinds, pixel_labels, swatch, to_image, token_colors


class Part(NamedTuple):
    """Rows of one crop, tile or frame on its grid.

    Attributes:
        number: of the crop among those of its image.
        grid: rows (high, wide).
        rows: row of the image at every cell [high * wide], -1 where there is none (padding of a crop).
    """

    number: int
    grid: tuple[int, int]
    rows: np.ndarray


def parts_of(place: Tensor) -> list[Part]:
    """The crops of an image, from the places of its rows.

    Args:
        place: (crop, row, column) of each row [n, 3], infinity for rows that stand nowhere (new lines).

    Raises:
        ValueError: rows that form no grid.
    """
    values = place.double().numpy()
    there = np.isfinite(values).all(1)
    cells, sides = np.zeros((len(values), 2), dtype=np.int64), []
    for axis in (1, 2):
        known = np.unique(values[there, axis])
        step = 1.0 if len(known) < 2 else np.diff(known).min()
        cells[there, axis - 1] = np.round((values[there, axis] - known[0]) / step)
        sides.append(int(cells[there, axis - 1].max()) + 1)
    found = []
    for number, crop in enumerate(np.unique(values[there, 0])):
        mine = np.flatnonzero(there & (values[:, 0] == crop))
        index = cells[mine, 0] * sides[1] + cells[mine, 1]
        if len(np.unique(index)) != len(index):
            raise ValueError("rows of this image lie between the patches of its crops, and cannot be drawn over them")
        rows = np.full(sides[0] * sides[1], -1)
        rows[index] = mine
        found.append(Part(number, (sides[0], sides[1]), rows))
    return found


def draw_rows(
    images: Sequence[Image.Image],
    parts: Sequence[Part],
    assign: Tensor,
    side: int = 320,
    title: str = "",
    later: Sequence[tuple[int, Tensor]] = (),
) -> Image.Image:
    """Draws every crop, and beside it which of its patches the language model sees, at its entry and behind cuts.

    Args:
        images: of the crops.
        parts: where their rows are.
        assign: row whose place each row of the image went to [n], itself where it stays, -1 where it was dropped.
        side: pixels of a panel's longer side, at least.
        title: line above everything.
        later: layer in front of which rows leave the language model, and which rows are left then [n] bool.
    """
    panels, seen = [], set()
    known = assign.cpu()
    steps = [("seen", known)]
    for layer, left in later:  # rows that were merged go with the row whose place they went to
        there = left.cpu()[known.clamp(min=0)] & (known >= 0)
        steps.append((f"from layer {layer} on", torch.where(there, known, -1)))
    for image, part in zip(images, parts):
        cell = max(4, -(-side // max(part.grid)))
        picture = image.convert("RGB").resize((part.grid[1] * cell, part.grid[0] * cell), Image.Resampling.LANCZOS)
        before = int((part.rows >= 0).sum())
        crop = "image" if len(parts) == 1 else f"crop {part.number}"
        panels.append((picture, crop, f"{before} rows"))
        for name, target in steps:
            drawn, after, kinds = _painted(picture, part, target, cell)
            panels.append((drawn, name, f"{before} -> {after} rows"))
            before = after
            seen |= kinds
    return compose(panels, [(swatch(kind), LEGEND[kind]) for kind in sorted(seen)], title, 1 + len(steps))


def _painted(picture: Image.Image, part: Part, assign: Tensor, cell: int) -> tuple[Image.Image, int, set[int]]:
    """A crop with the patches that are left, how many these are, and which kinds of patches it shows."""
    goes = np.append(assign.numpy(), -1)  # the last one is read by cells without a row
    slots = np.unique(goes[goes >= 0])
    target = goes[part.rows]
    token = np.where(target >= 0, np.searchsorted(slots, target), -1)
    where = {row: spot for spot, row in enumerate(part.rows.tolist()) if row >= 0}
    origin = np.array([where.get(slot, -1) for slot in slots.tolist()], dtype=np.int64)
    kind = patch_kinds(token, origin)
    pixels = np.asarray(picture, dtype=np.float64) / 255
    labels, kinds = (pixel_labels(values, part.grid, pixels.shape[:2]) for values in (token, kind))
    drawn = to_image(paint(pixels, labels, kinds, token_colors(token, origin), max(1, cell // 12)))
    return drawn, sum(slot in where for slot in slots.tolist()), set(kind.tolist())
