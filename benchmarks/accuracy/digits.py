"""scikit-learn's handwritten digits, enlarged: the data of `vim_digits.py`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 40  # five times the 8 x 8 of the data: patches of 4 pixels make a grid of 10 x 10
TEST_IMAGES = 360
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images [N, 1, 40, 40] with ink in [0, 1], and labels [N] int64, of both parts of the split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1797 digits that scikit-learn carries, enlarged, in a fixed stratified split of 1437 and 360."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED)
    ink = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    ink = F.interpolate(ink, size=IMAGE_SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    labels = torch.tensor(labels, dtype=torch.int64)
    return Digits(ink[train], labels[train], ink[test], labels[test])


def normalize(ink: Tensor) -> Tensor:
    """Ink in [0, 1] to the model's input in [-1, 1]."""
    return ink * 2 - 1


def augment(ink: Tensor) -> Tensor:
    """A random rotation, scale, shear and shift for each image [B, 1, S, S]."""
    batch, side = len(ink), ink.shape[-1]

    def draw(width: float) -> Tensor:
        return (torch.rand(batch) * 2 - 1) * width

    angle, scale = draw(math.radians(12)), 1 + draw(0.12)
    shear, shift = draw(0.12), 2 * 4 / side  # four pixels
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, draw(shift)], 1), torch.stack([sin, cos, draw(shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)
