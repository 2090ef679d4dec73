"""Pseudo-random numbers that are the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

_PRIME = 2_147_483_647


def fixed_draw(length: int, seed: int, device: torch.device) -> Tensor:
    """Pseudo-random scores [length] from integers alone: equal on every device, traceable, exportable."""
    x = torch.arange(1, length + 1, device=device) * 7919 + (seed % 100_003) * 104_729 + 12_345
    for factor in (48_271, 69_621, 39_373):
        x = (x % _PRIME) * factor % _PRIME
        x = x * x % _PRIME  # squaring leaves the lattice of a plain congruential generator
    return x.double() / _PRIME
