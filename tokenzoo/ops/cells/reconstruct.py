"""Spreads values of cluster centres back to the tokens that were clustered.

Pure tensor code. Source: Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning", NeurIPS 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import full_precision
from ..rows import take_rows
from .kmeans import from_middle, hard_labels, row_slices

NORMS = ("l2", "l1")


def reconstruct(
    values: Tensor,
    x: Tensor,
    centers: Tensor,
    temperature: float | Tensor = 0.02,
    k: int = 20,
    norm: str = "l2",
    visible: Tensor | None = None,
) -> Tensor:
    """Mixes the values of the k nearest centres for every token, weighted by exp(-temperature * squared distance).

    The released code divides the weights of a token by their L2 norm, so that they sum to between 1 and sqrt(k) and
    outputs grow where several centres are near; `norm="l1"` makes them sum to 1. Distances are computed in float32, a
    slice of tokens at a time, and each token's smallest is taken off first: far from all centres the released code
    underflows to zero. All centres as near as the k-th are kept. The weights carry no gradient.

    Args:
        values: values of the centres [B, M, D].
        x: tokens before clustering [B, N, C].
        centers: final centres [B, M, C].
        temperature: inverse temperature, the factor of the squared distances; one number, or one per image [B, 1, 1].
        k: centres to mix, all where there are no more; -1 for all.
        norm: "l2" (as released) or "l1".
        visible: [B, M] bool, False for centres of tokens that a mask hides: nobody mixes them; None without a mask.

    Returns:
        [B, N, D] in the dtype of the values.

    Raises:
        ValueError: k or norm out of range, or values of another number of centres.

    Source: Liang et al., NeurIPS 2022.
    """
    count = centers.shape[1]
    if k != -1 and k < 1:
        raise ValueError(f"reconstruct: k={k}; give the number of centres to mix, at least 1, or -1 for all")
    if norm not in NORMS:
        raise ValueError(f"reconstruct: norm={norm!r} is unknown; use 'l2' (as released) or 'l1' (weights sum to 1)")
    if values.shape[1] != count:
        raise ValueError(f"reconstruct: values of {values.shape[1]} centres, but {count} centres were clustered")
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"reconstruct: temperature={temperature}; the inverse temperature must be positive")
    x, centers = x.detach(), centers.detach()
    dtype = torch.promote_types(torch.promote_types(values.dtype, x.dtype), torch.float32)
    mixed, parts = values.to(dtype), []
    with full_precision(x):
        offset, bias = from_middle(centers.to(dtype), visible)
        for start, stop in row_slices(x, count):
            distance = bias.transpose(1, 2) - 2 * x[:, start:stop].to(dtype) @ offset.transpose(1, 2)
            weights = _weights(distance, temperature, k, norm)
            parts.append((weights @ mixed).to(values.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _weights(distance: Tensor, temperature: float | Tensor, k: int, norm: str) -> Tensor:
    """Weights of the centres for some tokens [B, n, M], from squared distances up to a number per token."""
    weights = (temperature * (distance.amin(2, keepdim=True) - distance)).exp()
    if 0 < k < weights.shape[2]:
        least = weights.topk(k, dim=2).values[..., -1:]
        weights = weights.masked_fill(weights < least, 0)
    total = weights.norm(dim=2, keepdim=True) if norm == "l2" else weights.sum(2, keepdim=True)
    return weights / total  # the nearest centre has weight 1: the total is at least 1


def copy_back(values: Tensor, x: Tensor, centers: Tensor, visible: Tensor | None = None) -> Tensor:
    """Gives every token the value of its nearest centre.

    Args:
        values: values of the centres [B, M, D].
        x: tokens before clustering [B, N, C].
        centers: final centres [B, M, C].
        visible: [B, M] bool, see `reconstruct`.

    Returns:
        [B, N, D].
    """
    return take_rows(values, hard_labels(x, centers, visible))
