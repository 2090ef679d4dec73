"""Runs a function on a few images of a batch at a time where that keeps its intermediate maps in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Numbers of the largest intermediate map that are wanted at once on a CPU. Larger maps leave the cache, and the
# allocator gives their pages back and has them cleared again from one layer to the next.
_CPU_NUMBERS = 1 << 20


def by_images(function: Callable[[Tensor], Tensor], x: Tensor, numbers: int, training: bool) -> Tensor:
    """Applies a function that treats the images of a batch one by one outside of training.

    Whole batches go through in training (BatchNorm), with gradients, in traced graphs and off the CPU.

    Args:
        function: [B, ...] -> [B, ...].
        x: batch [B, ...].
        numbers: how many numbers the largest intermediate map of one image holds.
        training: whether the function's modules are in training mode.

    Returns:
        function(x).
    """
    step = at_once(x, numbers, training)
    if step >= x.shape[0]:
        return function(x)
    return torch.cat([function(part) for part in x.split(step)])


def at_once(x: Tensor, numbers: int, training: bool) -> int:
    """How many images of a batch `by_images` takes at a time; arguments as there."""
    whole = training or torch.is_grad_enabled() or x.device.type != "cpu"
    if whole or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.shape[0]
    return max(1, _CPU_NUMBERS // numbers)
