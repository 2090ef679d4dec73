"""Rows made of low frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.low_pass import low_pass
from .deciding import deciding


def fourier(x: Tensor, grid: tuple[int, int], cells: tuple[int, int], rescale: bool = True) -> Tensor:
    """The low spatial frequencies of a grid of rows, as a smaller grid: cosine transform, cut, transform back.

    Args:
        x: rows, line by line [B, high * wide, C].
        grid: (high, wide).
        cells: (down, across) of the smaller grid.
        rescale: constants stay as they are; False is the published transform between orthonormal bases.

    Returns:
        [B, down * across, C], in the type of x and with its gradient.

    Source: Wang et al., "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language
    Models", 2025.
    """
    down, right = (_weights(x, few, many, rescale) for few, many in zip(cells, grid))
    y = torch.einsum("ih,bhwc,jw->bijc", down, x.to(down.dtype).unflatten(1, grid), right)
    return y.flatten(1, 2).to(x.dtype)


@deciding
def _weights(x: Tensor, few: int, many: int, rescale: bool) -> Tensor:
    """The matrix of one axis [few, many], float32 at least."""
    count = (torch.tensor([[[n]]], device=x.device) for n in (few, many))
    found = low_pass(*count, few, many)[0].to(torch.promote_types(x.dtype, torch.float32))
    return found if rescale else found * (many / few) ** 0.5
