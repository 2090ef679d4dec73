"""Pseudo-random numbers that are the same on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PRIME = 2_147_483_647


def fixed_draw(length: int, seed: int, device: torch.device) -> Tensor:
    """Pseudo-random scores [length] from integers alone: equal on every device, traceable, exportable."""
    return _mixed(torch.arange(length, device=device), seed).double() / _PRIME


def drawn(index: int, seed: int) -> float:
    """The score at one index of `fixed_draw`, for counts that have to be known as plain integers."""
    return _mixed(index, seed) / _PRIME


def _mixed(index: Any, seed: int) -> Any:
    """Pseudo-random integers below the prime, of one index or of a tensor of indices."""
    x = (index + 1) * 7919 + (seed % 100_003) * 104_729 + 12_345
    for factor in (48_271, 69_621, 39_373):
        x = (x % _PRIME) * factor % _PRIME
        x = x * x % _PRIME  # squaring leaves the lattice of a plain congruential generator
    return x
