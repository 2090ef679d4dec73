"""Means over the batches of all processes, for losses that are no means over images themselves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def mean_of_all(mean: Tensor) -> Tensor:
    """The mean over all processes of a mean over the images of each, with the gradient of the own one.

    A function of it, whose gradients DDP averages, gets the gradient that one process with all images would give it.

    Args:
        mean: of this process; all have as many images.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    with torch.no_grad():
        total = mean.clone()
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return mean + (total - mean).detach()
