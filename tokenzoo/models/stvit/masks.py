"""Which keys are hidden from attention around windows: those of padding, exactly or as the released code has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASKS = ("released", "exact", None)
_HIDDEN = -1000.0  # published logit offset of hidden keys


def released_bias(size: tuple[int, int], pads: tuple[int, int], like: Tensor) -> Tensor:
    """What the released code adds to the logits of the places of a map, and to what lies outside of it, which is last.

    It means to hide the padding, and hides the rectangle in the lower right corner where both strips of padding meet.
    Without padding the slice `-0:` is everything.

    Args:
        size: places of the map (high, wide).
        pads: rows and columns of padding, in image tokens also where the map is one of semantic tokens.
        like: gives device and number format.

    Returns:
        [H * W + 1].
    """
    inside = torch.zeros(size, dtype=like.dtype, device=like.device)
    inside[-pads[0] :, -pads[1] :] = _HIDDEN
    return F.pad(inside.flatten(), (0, 1), value=_HIDDEN)


def exact_bias(starts: tuple[Tensor, Tensor], ends: tuple[int, int], like: Tensor) -> Tensor:
    """Minus infinity for places that no image token is part of, and for what lies outside of the map, which is last.

    Args:
        starts: first row of every row of places, and first column of every column, in image tokens.
        ends: size of the image in tokens (high, wide).
        like: gives the number format.

    Returns:
        [H * W + 1].
    """
    hidden = (starts[0] >= ends[0])[:, None] | (starts[1] >= ends[1])
    hidden = F.pad(hidden.flatten(), (0, 1), value=True)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))


def bin_starts(size: int, window: int, sample: int, device: torch.device) -> Tensor:
    """First image token of every semantic token along one direction [size / window * sample].

    Args:
        size: image tokens of the direction, whole windows.
        window: image tokens of a window.
        sample: semantic tokens of a window.
        device: where they are wanted.
    """
    inside = torch.arange(sample, device=device) * window // sample
    return (torch.arange(0, size, window, device=device)[:, None] + inside).flatten()
