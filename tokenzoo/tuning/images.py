"""The user's images: checked, and split into those that search and those that report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST = 4  # images on either side


class Split(NamedTuple):
    """Which images do what; the two have none in common.

    Attributes:
        search: indices that the search may look at, in the order in which it does.
        held_out: indices that only the report looks at.
    """

    search: tuple[int, ...]
    held_out: tuple[int, ...]


def read_images(images: Any, labels: Any = None) -> tuple[Tensor, Tensor | None]:
    """Images as one tensor [N, C, H, W], labels as another [N].

    Args:
        images: a tensor [N, C, H, W], or a sequence (a list, a map-style data set) of tensors [C, H, W] or of pairs of
            such a tensor and a label.
        labels: class indices, a tensor or a sequence; None for those in the pairs, if there are any.

    Raises:
        ValueError, TypeError: no images, images of several sizes, or labels of another length.
    """
    found = None
    if not isinstance(images, Tensor):
        if not isinstance(images, Sequence) and not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
            raise TypeError(
                f"images={type(images).__name__}; give a tensor [N, C, H, W] or a sequence of tensors [C, H, W]"
            )
        items = [images[i] for i in range(len(images))]
        if items and isinstance(items[0], (tuple, list)):
            found = [int(item[1]) for item in items]
            items = [item[0] for item in items]
        for i, item in enumerate(items):
            if not isinstance(item, Tensor) or item.dim() != 3 or item.shape != items[0].shape:
                what = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
                raise ValueError(f"image {i} is {what}; give tensors [C, H, W] of one size, normalised for the model")
        images = torch.stack(items) if items else torch.empty(0, 3, 1, 1)
    if images.dim() != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}; give [N, C, H, W]")
    if len(images) == 0:
        raise ValueError("there are no images to search with; give some of those that the model is for")
    labels = found if labels is None else labels
    if labels is None:
        return images, None
    labels = torch.as_tensor(labels)
    if labels.shape != (len(images),):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but there are {len(images)} images; give one class index each"
        )
    return images, labels.long().cpu()


def split(count: int, held_out: float, seed: int) -> Split:
    """Draws the images that report; the same seed gives the same ones.

    Args:
        count: images there are.
        held_out: their share, in (0, 1).
        seed: of the draw.

    Raises:
        ValueError: too few images, or a share out of range.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out!r}; give the share of the images that only the report looks at, below 1")
    kept = round(count * held_out)
    if min(kept, count - kept) < LEAST:
        raise ValueError(
            f"{count} images are too few to split into {count - kept} to search with and {kept} to report on; give at "
            f"least {LEAST} for each, better some hundreds"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(tuple(order[kept:]), tuple(order[:kept]))


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """A short hash of some tensors: their shapes, and up to a thousand values of each from all over it."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        flat = flat[:: max(1, len(flat) // 1000)]
        found.update(repr(tuple(tensor.shape)).encode())
        found.update(flat.double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
