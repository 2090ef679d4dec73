"""Painting token maps pixel by pixel, and laying panels out. What the pictures mean is in `visualize.py`."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

KEPT, MERGED, FUSED, DROPPED = range(4)
LEGEND = (
    "kept: the patch as it is",
    "merged: mean colour, one outline colour per token",
    "fused: patches left out, together one token",
    "dropped",
)
_GOLDEN_RATIO = 0.618034
_MARGIN, _TEXT = 12, 14


def pixel_labels(values: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Values of the patches [P] for every pixel [H, W]."""
    high, wide = grid
    if values.shape != (high * wide,):
        raise ValueError(f"assign has shape {values.shape}; a grid of {high} x {wide} patches needs ({high * wide},)")
    if shape[0] % high or shape[1] % wide:
        raise ValueError(f"image has {shape[0]} x {shape[1]} pixels, no multiple of {high} x {wide} patches; resize it")
    return values.reshape(grid).repeat(shape[0] // high, axis=0).repeat(shape[1] // wide, axis=1)


def inner_edges(labels: np.ndarray, width: int) -> np.ndarray:
    """Inner edge of every group, `width` pixels wide; at width 1 what a 4-neighbour erosion takes away."""
    high, wide = labels.shape
    edge = np.zeros((high, wide), dtype=bool)
    # what lies outside the picture belongs to no group
    around = np.pad(labels, width, constant_values=-2)
    for step in range(1, width + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            there = around[width + down : width + down + high, width + right : width + right + wide]
            edge |= there != labels
    return edge


def mean_colors(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean colour of every label from 0 on; the last row, which index -1 reads, is that of the dropped pixels."""
    flat = labels.ravel() % (labels.max(initial=0) + 2)
    count = np.bincount(flat)
    sums = np.stack([np.bincount(flat, weights=pixels[..., c].ravel()) for c in range(3)], axis=1)
    means = sums / np.maximum(count, 1)[:, None]
    return means if labels.min() < 0 else np.concatenate([means, np.zeros((1, 3))])


def _grey(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ np.array([0.299, 0.587, 0.114]))[..., None].repeat(3, axis=-1)


def darkened(pixels: np.ndarray) -> np.ndarray:
    """Dark, grey and hatched."""
    down, right = np.indices(pixels.shape[:2])
    hatch = ((down + right) % 8 < 2)[..., None]
    return 0.3 * _grey(pixels) + 0.05 + 0.18 * hatch


def patch_kinds(assign: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Kept, merged, fused or dropped, for every patch."""
    members = np.bincount(assign[assign >= 0], minlength=len(origin))
    kind = np.where(members[assign] > 1, MERGED, KEPT)
    kind = np.where(origin[assign] < 0, FUSED, kind)
    return np.where(assign < 0, DROPPED, kind)


def token_colors(assign: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Outline of every token [N', 3]: white for fused ones, else a bright colour.

    The hue follows the first patch of a group, so that most groups keep theirs from block to block.
    """
    first = np.full(len(origin), len(assign))
    np.minimum.at(first, assign[assign >= 0], np.flatnonzero(assign >= 0))
    bright = [colorsys.hsv_to_rgb(patch * _GOLDEN_RATIO % 1, 0.85, 1.0) for patch in first]
    return np.where((origin >= 0)[:, None], bright, 1.0)


def paint(pixels: np.ndarray, labels: np.ndarray, kinds: np.ndarray, colors: np.ndarray, width: int) -> np.ndarray:
    """One panel.

    Args:
        pixels: the picture [H, W, 3], values from 0 to 1.
        labels: token of every pixel [H, W], -1 for dropped.
        kinds: kind of every pixel [H, W].
        colors: outline of every token [N', 3].
        width: pixels of the outline.
    """
    out = pixels.copy()
    mean = mean_colors(pixels, labels)[labels]
    merged, fused, dropped = kinds == MERGED, kinds == FUSED, kinds == DROPPED
    out[merged] = (0.85 * mean + 0.15 * pixels)[merged]
    down, right = np.indices(labels.shape)
    dots = ((down % 6 < 2) & (right % 6 < 2))[..., None]
    violet = 0.35 * _grey(pixels) + 0.2 * mean + np.array([0.25, 0.12, 0.4]) + 0.25 * dots
    out[fused] = violet.clip(0, 1)[fused]
    out[dropped] = darkened(pixels)[dropped]
    edge = inner_edges(labels, width) & (merged | fused)
    out[edge] = colors[labels[edge]]
    return out


def to_image(pixels: np.ndarray) -> Image.Image:
    """Values from 0 to 1 as an 8-bit picture."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def swatch(kind: int) -> Image.Image:
    """A small sample for the legend, painted as in the panels."""
    side = _TEXT + 4
    down, right = np.indices((side, side)) / side
    pixels = np.stack([0.55 + 0.3 * down, 0.45 + 0.3 * right, 0.35 + 0.2 * (1 - down)], axis=-1)
    assign, origin = np.array([-1 if kind == DROPPED else 0]), np.array([-1 if kind == FUSED else 0])
    labels = pixel_labels(assign, (1, 1), (side, side))
    return to_image(paint(pixels, labels, np.full((side, side), kind), token_colors(assign, origin), 2))


def compose(
    panels: list[tuple[Image.Image, str, str]], legend: list[tuple[Image.Image, str]], title: str, columns: int | None
) -> Image.Image:
    """Lays panels out in rows.

    Args:
        panels: pictures of one size, each with two lines of caption.
        legend: samples and what they mean, below.
        title: line above, or "".
        columns: panels per row; None decides.
    """
    wide, high = panels[0][0].size
    font, line = ImageFont.load_default(_TEXT), _TEXT + 6
    if columns is None:
        columns = len(panels) if len(panels) <= 5 else math.ceil(math.sqrt(len(panels) * high / wide * 1.6))
    rows = math.ceil(len(panels) / columns)
    captions = max(font.getlength(text) for _, *texts in panels for text in texts)
    step_x, step_y = max(wide, math.ceil(captions)) + _MARGIN, high + 2 * line + _MARGIN
    entries = [
        (sample, text, sample.width + 8 + math.ceil(font.getlength(text)) + 2 * _MARGIN) for sample, text in legend
    ]
    inside = max(columns * step_x - _MARGIN, math.ceil(font.getlength(title)), *(space for *_, space in entries), 0)
    width = inside + 2 * _MARGIN
    legend_rows: list[list[tuple[Image.Image, str, int]]] = []
    room = 0
    for entry in entries:
        if entry[2] > room:
            legend_rows.append([])
            room = inside
        legend_rows[-1].append(entry)
        room -= entry[2]
    top = _MARGIN + (line + 4 if title else 0)
    canvas = Image.new("RGB", (width, top + rows * step_y + len(legend_rows) * (line + 6) + _MARGIN // 2), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 2), title, fill="black", font=font)
    for number, (panel, name, counts) in enumerate(panels):
        x, y = _MARGIN + number % columns * step_x, top + number // columns * step_y
        draw.text((x, y), name, fill="black", font=font)
        draw.text((x, y + line - 3), counts, fill=(90, 90, 90), font=font)
        canvas.paste(panel, (x, y + 2 * line))
    y = top + rows * step_y
    for row in legend_rows:
        x = _MARGIN
        for sample, text, space in row:
            canvas.paste(sample, (x, y))
            draw.text((x + sample.width + 8, y + 1), text, fill="black", font=font)
            x += space
        y += line + 6
    return canvas
