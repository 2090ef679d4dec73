"""Window inference in the forms of the reference code: where windows lie, and logits averaged where they overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Tensor]  # images [B, 3, h, w] -> class logits [B, K, h, w]


class Box(NamedTuple):
    """A window: rows top to bottom, columns left to right, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


def anchors_segmenter(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows along an axis: every stride, and one that ends at the end.

    Args:
        length: pixels of the axis, at least `window`.
        window: pixels of a window.
        stride: pixels between starts.
    """
    return [*range(0, length - window, stride), length - window]


def spans_mmseg(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Starts and ends along an axis: every stride, those that would stick out moved back, short axes in one piece.

    Args:
        length: pixels of the axis.
        window: pixels of a window.
        stride: pixels between starts.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(i * stride + window, length) for i in range(count)]
    return [(max(end - window, 0), end) for end in ends]


def spans_even(length: int, window: int) -> list[tuple[int, int]]:
    """As few windows as cover an axis, spread evenly.

    Args:
        length: pixels of the axis.
        window: pixels of a window.
    """
    count = math.ceil(length / window)
    surplus = count * window - length
    step = window - (surplus / (count - 1) if count > 1 and surplus > 0 else 0)
    return [(int(i * step), int(i * step) + window) for i in range(count)]


def average_windows(model: Model, image: Tensor, boxes: Sequence[Box], batch_size: int = 1) -> Tensor:
    """Logits of every window, averaged where windows overlap; every window is a forward pass of its own.

    Args:
        model: images [B, 3, h, w] -> class logits [B, K, h, w].
        image: normalised [1, 3, H, W].
        boxes: windows that cover the image; those of equal size go through the model together.
        batch_size: windows at a time.

    Returns:
        Logits [1, K, H, W] float32.
    """
    height, width = image.shape[-2:]
    total, counts = None, torch.zeros(1, 1, height, width, device=image.device)
    for group in _groups(boxes, batch_size):
        crops = torch.cat([image[:, :, b.top : b.bottom, b.left : b.right] for b in group])
        logits = model(crops).float()
        if total is None:
            total = logits.new_zeros(1, logits.shape[1], height, width)
        for box, one in zip(group, logits):
            total[0, :, box.top : box.bottom, box.left : box.right] += one
            counts[:, :, box.top : box.bottom, box.left : box.right] += 1
    return total / counts


def _groups(boxes: Sequence[Box], batch_size: int) -> Iterator[list[Box]]:
    """Neighbours of equal size, at most batch_size at a time."""
    group: list[Box] = []
    for box in boxes:
        same = group and (box.bottom - box.top, box.right - box.left) == (
            group[0].bottom - group[0].top,
            group[0].right - group[0].left,
        )
        if group and (not same or len(group) == batch_size):
            yield group
            group = []
        group.append(box)
    if group:
        yield group


def slide_segmenter(model: Model, image: Tensor, window: int, stride: int, batch_size: int = 1) -> Tensor:
    """Segmenter's window inference; an image that is too small is enlarged until its short side equals the window.

    Args:
        model: images [B, 3, h, w] -> class logits [B, K, h, w].
        image: normalised [1, 3, H, W].
        window: side of the square windows, pixels.
        stride: pixels between windows.
        batch_size: windows at a time.

    Returns:
        Logits [1, K, H', W'] at the size that the windows were cut from.

    Source: Strudel et al., Segmenter, ICCV 2021 (released inference code).
    """
    check_stride(window, window, stride, stride)
    height, width = image.shape[-2:]
    if min(height, width) < window:
        long = int(max(height, width) / min(height, width) * window)
        size = (window, long) if height < width else (long, window)
        image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        height, width = size
    rows, columns = (anchors_segmenter(n, window, stride) for n in (height, width))
    boxes = [Box(top, left, top + window, left + window) for top in rows for left in columns]
    return average_windows(model, image, boxes, batch_size)


def slide_mmseg(
    model: Model,
    image: Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
    batch_size: int = 1,
) -> Tensor:
    """Slide mode of mmsegmentation; small images are neither enlarged nor padded.

    Args:
        model: images [B, 3, h, w] -> class logits [B, K, h, w].
        image: normalised [1, 3, H, W].
        window: side or (height, width), pixels.
        stride: pixels between windows, one or (down, across).
        batch_size: windows at a time.

    Returns:
        Logits [1, K, H, W].

    Source: mmsegmentation, `EncoderDecoder.slide_inference`.
    """
    window = (window, window) if isinstance(window, int) else window
    stride = (stride, stride) if isinstance(stride, int) else stride
    check_stride(*window, *stride)
    rows, columns = (spans_mmseg(n, w, s) for n, w, s in zip(image.shape[-2:], window, stride))
    boxes = [Box(top, left, bottom, right) for top, bottom in rows for left, right in columns]
    return average_windows(model, image, boxes, batch_size)


def slide_even(model: Model, image: Tensor, window: int, batch_size: int = 1) -> Tensor:
    """EoMT's window inference: squares spread evenly along the long side; the short side is the window already.

    Args:
        model: images [B, 3, h, w] -> class scores [B, K, h, w].
        image: normalised [1, 3, H, W] with a short side of `window` pixels.
        window: side of the squares.
        batch_size: windows at a time.

    Returns:
        Scores [1, K, H, W].

    Raises:
        ValueError: the short side differs from the window.

    Source: Kerssies et al., EoMT, CVPR 2025.
    """
    height, width = image.shape[-2:]
    if min(height, width) != window:
        raise ValueError(f"windows of {window} along an image of {height}x{width}: resize its short side to {window}")
    if height > width:
        boxes = [Box(start, 0, end, width) for start, end in spans_even(height, window)]
    else:
        boxes = [Box(0, start, height, end) for start, end in spans_even(width, window)]
    return average_windows(model, image, boxes, batch_size)


def check_stride(height: int, width: int, down: int, across: int) -> None:
    """Raises ValueError for windows that do not move or leave gaps."""
    if min(height, width, down, across) < 1 or down > height or across > width:
        raise ValueError(
            f"windows of {height}x{width} with stride {down}x{across} leave gaps or do not move; give a stride from 1 "
            "to the window"
        )
