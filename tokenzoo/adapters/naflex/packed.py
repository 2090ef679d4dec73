"""A batch of patches, as timm's NaFlex loader makes it: images have grids of their own, padded to the longest."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Patches of a batch.

    Attributes:
        patches: [B, N, P * P * C] or [B, N, P, P, C].
        coord: (row, column) of every patch [B, N, 2].
        valid: False for padding [B, N], None where all patches are real.
        grid: of all images, where it is the same and nothing is padded; else None.
    """

    patches: Tensor
    coord: Tensor
    valid: Tensor | None
    grid: tuple[int, int] | None

    @classmethod
    def of(cls, model: Any, patches: Tensor, coord: Tensor, valid: Tensor | None) -> Packed:
        """A batch that has been looked at.

        Args:
            model: for messages.
            patches: see `Packed`.
            coord: see `Packed`.
            valid: see `Packed`.

        Raises:
            ValueError: padding stands in front of a patch.
        """
        valid = None if valid is None else valid.bool()
        if valid is not None and patches.numel() and bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            raise ValueError(
                f"{type(model).__name__}: patch_valid has padding in front of real patches; put the real patches of "
                "each image first, row by row, as timm's loader does"
            )
        if valid is not None and bool(valid.all()):
            valid = None
        return cls(patches, coord, valid, None if valid is not None else _one_grid(coord))

    @property
    def shape(self) -> torch.Size:
        """Of the patches."""
        return self.patches.shape

    @property
    def length(self) -> int:
        """Patches of an image, padding included."""
        return self.patches.shape[1]


def _one_grid(coord: Tensor) -> tuple[int, int] | None:
    """The grid that all images have, row by row; None where they differ."""
    if coord.shape[0] == 0:
        return None
    high, wide = (coord[0].amax(0) + 1).tolist()
    if high * wide != coord.shape[1]:
        return None
    index = torch.arange(high * wide, device=coord.device)
    grid = torch.stack([index.div(wide, rounding_mode="floor"), index % wide], dim=1)
    return (int(high), int(wide)) if bool((coord == grid).all()) else None
