"""Pictures and masks in memory, and the random views that training takes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.segmentation.data import SegmentationDataset

IGNORE = 255


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a training view is cut out of a picture.

    Args:
        crop: (height, width) of a view; smaller pictures are padded with ignored pixels.
        scale: factors that pictures are resized by, drawn between the two.
        flip: probability of a mirrored view.
        jitter: largest relative change of brightness, contrast and saturation.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.3

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop={self.crop!r}; give (height, width)")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={self.scale!r}; give the smallest and the largest factor")
        if not 0 <= self.flip <= 1 or not 0 <= self.jitter < 1:
            raise ValueError(f"flip={self.flip} has to be in [0, 1] and jitter={self.jitter} in [0, 1)")

    def draw(self, image: Tensor, mask: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """One view.

        Args:
            image: [3, H, W] uint8.
            mask: [H, W] uint8.
            rng: where all randomness comes from.

        Returns:
            image [3, h, w] float32 from 0 to 1, mask [h, w] int64.
        """
        draw = torch.rand(7, generator=rng).tolist()
        low, high = (math.log(s) for s in self.scale)
        factor = math.exp(low + (high - low) * draw[0])
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        view, labels = image[None].float() / 255, mask[None, None].float()
        (top, tall), (left, wide) = (_span(side, crop, at) for side, crop, at in zip(size, self.crop, draw[1:3]))
        view = F.interpolate(view, tuple(size), mode="bilinear", align_corners=False, antialias=factor < 1)
        labels = F.interpolate(labels, tuple(size), mode="nearest-exact")
        view, labels = (x[:, :, top : top + tall, left : left + wide] for x in (view, labels))
        if draw[3] < self.flip:
            view, labels = view.flip(3), labels.flip(3)
        view = _jitter(view, [1 + self.jitter * (2 * d - 1) for d in draw[4:7]])
        pad = (0, self.crop[1] - wide, 0, self.crop[0] - tall)
        view, labels = F.pad(view, pad, value=0.5), F.pad(labels, pad, value=IGNORE)
        return view[0], labels[0, 0].long()


def _span(side: int, crop: int, at: float) -> tuple[int, int]:
    """(start, length) of a crop along one axis."""
    return (0, side) if side <= crop else (int(at * (side - crop + 1)), crop)


def _jitter(x: Tensor, factors: list[float]) -> Tensor:
    """Brightness, contrast and saturation of x [1, 3, H, W] by the factors."""
    brightness, contrast, saturation = factors
    x = x * brightness
    grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = grey.mean() + (x - grey.mean()) * contrast
    x = grey + (x - grey) * saturation
    return x.clamp(0, 1)


class Gallery:
    """All pictures of a data set decoded once, as uint8 tensors.

    Args:
        data: pictures with masks.

    Raises:
        BrokenSample: the first picture or mask that cannot be used.
    """

    def __init__(self, data: SegmentationDataset) -> None:
        self.images: list[Tensor] = []
        self.masks: list[Tensor] = []
        for i in range(len(data)):
            sample = data[i]
            self.images.append(torch.from_numpy(np.array(sample.image)).permute(2, 0, 1).contiguous())
            self.masks.append(torch.from_numpy(sample.mask.copy()))

    def __len__(self) -> int:
        return len(self.images)

    def class_pixels(self, num_classes: int) -> Tensor:
        """Labelled pixels of each class [K] float64."""
        counts = torch.zeros(num_classes, dtype=torch.float64)
        for mask in self.masks:
            counts += torch.bincount(mask[mask != IGNORE].long(), minlength=num_classes)[:num_classes]
        return counts
