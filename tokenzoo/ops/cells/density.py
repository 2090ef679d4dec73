"""Density peaks: centres are tokens in dense places, far from any token in a denser one (DPC-KNN).

Du, Ding, Jia, "Study on density peaks clustering based on k-nearest neighbors", 2016; on tokens: Zeng et al., "Not All
Tokens Are Equal", CVPR 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = float("inf")


def peak_scores(squared: Tensor, k: int, seen: Tensor | None = None) -> Tensor:
    """Logarithm of density times distance to the nearest denser token [B, N].

    Densities are compared by their logarithms: they themselves vanish in float32 where tokens are far apart.

    Args:
        squared: squared distances [B, N, N].
        k: neighbours that the density looks at, the token itself among them; all where there are fewer.
        seen: tokens that count [B, N] bool, None for all; what the others score says nothing.
    """
    k = min(k, squared.shape[1])
    if seen is None:
        log_density = -squared.topk(k, dim=2, largest=False).values.mean(2)
    else:
        squared = squared.masked_fill(~seen.unsqueeze(1), _FAR)
        nearest = squared.topk(k, dim=2, largest=False).values
        found = seen.sum(1, keepdim=True).clamp(min=1, max=k)
        log_density = -nearest.masked_fill(nearest == _FAR, 0).sum(2) / found
        log_density = log_density.masked_fill(~seen, -_FAR)
    sparser = log_density.unsqueeze(1) <= log_density.unsqueeze(2)
    nearest = squared.masked_fill(sparser, _FAR).amin(2)
    pairs = squared if seen is None else squared.masked_fill((squared == _FAR) | ~seen.unsqueeze(2), 0)
    nearest = torch.where(nearest == _FAR, pairs.flatten(1).amax(1, keepdim=True), nearest)
    return log_density + nearest.clamp(min=torch.finfo(nearest.dtype).tiny).log() / 2


def nearest_centre(squared: Tensor, centres: Tensor, real: Tensor | None = None) -> Tensor:
    """Number of the nearest centre of every token [B, N].

    Args:
        squared: squared distances [B, N, N], or any other that ranks alike.
        centres: indices of the centres [B, K].
        real: [B, K] bool, False for centres that are none; None where all are.
    """
    rows = torch.arange(squared.shape[0], device=squared.device).unsqueeze(1)
    apart = squared[rows, centres]  # [B, K, N]
    if real is not None:
        apart = apart.masked_fill(~real.unsqueeze(2), _FAR)
    return apart.argmin(1)
