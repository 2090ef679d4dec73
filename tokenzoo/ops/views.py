"""Shifted and flipped views of images, and the way back of what a model says about their patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WHITE = (2.2489083, 2.42857143, 2.64)  # a white pixel behind ImageNet's mean and deviation


class Views(NamedTuple):
    """How a number of views of every image come about: a shift by whole patches, then a flip from left to right.

    Attributes:
        offsets: [B, V, 2] whole patches (down, right); a view shows at y what stands at y + offset in the image.
        flips: [B, V] bool.
        grid: patches (down, right) of an image.
    """

    offsets: Tensor
    flips: Tensor
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        """Views of an image."""
        return self.offsets.shape[1]

    def to(self, device: torch.device) -> Views:
        """The same views on a device."""
        return self._replace(offsets=self.offsets.to(device), flips=self.flips.to(device))

    def sources(self) -> Tensor:
        """Where every patch of every view stands in the image [B, V, H, W, 2] (down, right), -1 outside of it."""
        (high, wide), device = self.grid, self.offsets.device
        down = torch.arange(high, device=device) + self.offsets[..., 0:1]  # [B, V, H]
        right = _flipped(wide, self.flips) + self.offsets[..., 1:2]  # [B, V, W]
        places = torch.stack(torch.broadcast_tensors(down.unsqueeze(3), right.unsqueeze(2)), dim=-1)
        outside = _outside(down, high).unsqueeze(3) | _outside(right, wide).unsqueeze(2)
        return places.masked_fill(outside.unsqueeze(-1), -1)

    def images(self, images: Tensor, view: int, fill: tuple[float, ...] = WHITE) -> Tensor:
        """One view of every image [B, C, H, W].

        Args:
            images: [B, C, H, W].
            view: its number.
            fill: what stands outside of the image, one value per channel.

        Raises:
            ValueError: images that are no whole number of patches, or a fill for other channels.
        """
        batch, channels, high, wide = images.shape
        if high % self.grid[0] or wide % self.grid[1] or len(fill) != channels:
            raise ValueError(
                f"views: images of {channels} x {high} x {wide} for a grid of {self.grid[0]} x {self.grid[1]} patches "
                f"and a fill of {len(fill)} values; give images of whole patches and a fill per channel"
            )
        offsets, flips = self.offsets[:, view], self.flips[:, view]
        rows = torch.arange(high, device=images.device) + offsets[:, :1] * (high // self.grid[0])
        columns = _flipped(wide, flips) + offsets[:, 1:] * (wide // self.grid[1])
        at = torch.arange(batch, device=images.device)[:, None, None]
        found = images.permute(0, 2, 3, 1)[at, rows.clamp(0, high - 1)[:, :, None], columns.clamp(0, wide - 1)[:, None]]
        outside = _outside(rows, high)[:, :, None] | _outside(columns, wide)[:, None]
        return torch.where(outside[..., None], images.new_tensor(fill), found).permute(0, 3, 1, 2).contiguous()

    def back(self, features: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """What a view says of every place of the image, 0 where it does not show it, and whether it shows it.

        Args:
            features: of the patches of a view in raster order [B, H * W, C].
            view: its number.

        Returns:
            [B, H * W, C], and [B, H * W] bool.
        """
        (high, wide), device = self.grid, features.device
        down = torch.arange(high, device=device) - self.offsets[:, view, :1]  # [B, H]
        right = torch.arange(wide, device=device) - self.offsets[:, view, 1:]
        seen = (~_outside(down, high)[:, :, None] & ~_outside(right, wide)[:, None]).flatten(1)
        right = torch.where(self.flips[:, view, None], wide - 1 - right, right)
        place = (down.clamp(0, high - 1)[:, :, None] * wide + right.clamp(0, wide - 1)[:, None]).flatten(1)
        found = features.gather(1, place.unsqueeze(-1).expand(-1, -1, features.shape[2]))
        return found.masked_fill(~seen.unsqueeze(-1), 0.0), seen

    def average(self, features: list[Tensor]) -> Tensor:
        """The mean over all views that show a place, of what they say of it [B, H * W, C].

        Args:
            features: one [B, H * W, C] per view, the first of which shows every place.
        """
        total = count = 0
        for view, each in enumerate(features):
            found, seen = self.back(each, view)
            total, count = total + found, count + seen.unsqueeze(-1).to(found.dtype)
        return total / count


def farthest(points: Tensor, count: int, first: Tensor) -> Tensor:
    """Indices [B, count] of points that lie far apart: each is the farthest from all chosen before.

    Args:
        points: [B, M, D].
        count: points to choose.
        first: index of the first one [B].
    """
    chosen, near = [first], None
    at = torch.arange(points.shape[0], device=points.device)
    for _ in range(count - 1):
        apart = (points - points[at, chosen[-1]].unsqueeze(1)).square().sum(2)
        near = apart if near is None else torch.minimum(near, apart)
        chosen.append(near.argmax(1))
    return torch.stack(chosen, dim=1)


def draw_views(
    batch: int, grid: tuple[int, int], count: int, share: float = 0.15, generator: torch.Generator | None = None
) -> Views:
    """Views that differ as much as shifts up to a share of the grid allow; the first is the image as it is.

    Args:
        batch: B.
        grid: patches (down, right).
        count: views of an image, V.
        share: largest shift, as a share of each side of the grid.
        generator: on the CPU; None for torch's own.

    Raises:
        ValueError: no view, or a share outside of [0, 1).

    Source: Chen, Yan, Zhou, Dai, Luo, "Vision Transformers with Self-Distilled Registers", NeurIPS 2025.
    """
    if count < 1 or not 0 <= share < 1:
        raise ValueError(f"count={count} views with shifts up to {share} of the grid; give 1 or more, and [0, 1)")
    drawn = []
    for side in grid:
        most = round(share * side)
        drawn.append(torch.randint(-most, most + 1, (batch, 10 * count), generator=generator))
    offsets = torch.stack(drawn, dim=2)
    first = torch.randint(0, 10 * count, (batch,), generator=generator)
    rows = farthest(offsets.float(), count, first)
    offsets = offsets.gather(1, rows.unsqueeze(-1).expand(-1, -1, 2))
    flips = torch.randint(0, 2, (batch, count), generator=generator).bool()
    offsets[:, 0], flips[:, 0] = 0, False
    return Views(offsets, flips, tuple(grid))


def _flipped(length: int, flips: Tensor) -> Tensor:
    """0 to length - 1, backwards where flipped [..., length]."""
    places = torch.arange(length, device=flips.device)
    return torch.where(flips.unsqueeze(-1), length - 1 - places, places)


def _outside(index: Tensor, length: int) -> Tensor:
    return (index < 0) | (index >= length)
