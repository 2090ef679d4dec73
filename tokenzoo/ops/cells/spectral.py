"""Spectral embedding of tokens: where likeness is measured along a graph of neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import full_precision


def spectral_rows(
    squared: Tensor, width: int, sigma: float | None, neighbours: int | None = None, seen: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of the smoothest eigenvectors of a graph's normalised Laplacian, of unit length [B, N, width] float32.

    Entries of the graph are exp(-d^2 / (2 sigma^2)). The cost is that of all eigenvectors of an N x N matrix per image,
    which ONNX has no operator for.

    Args:
        squared: squared distances of all pairs [B, N, N].
        width: eigenvectors to take.
        sigma: width of the kernel, in units of the tokens; None for the root of an image's mean squared distance.
        neighbours: an entry stays where one of the two is among so many nearest of the other, itself counted; None for
            all entries.
        seen: tokens that count [B, N] bool, None for all; the rows of others are zero.
        own: eigenvectors that each image takes of these [B, 1]; None for all.
    """
    with full_precision(squared):
        both, apart = None, squared
        if seen is not None:
            both = seen.unsqueeze(1) & seen.unsqueeze(2)
            apart = squared.masked_fill(~both, float("inf"))
        weight = torch.exp(squared / (-2 * (_mean_square(squared, both) if sigma is None else sigma**2)))
        weight = weight if both is None else weight * both
        if neighbours is not None and neighbours < squared.shape[1]:
            near = torch.zeros_like(weight, dtype=torch.bool)
            near = near.scatter(2, apart.topk(neighbours, dim=2, largest=False).indices, True)
            weight = weight * (near | near.transpose(1, 2))
        weight = weight.double()
        root = weight.sum(2).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        laplacian = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        laplacian = laplacian - root.unsqueeze(1) * weight * root.unsqueeze(2)
        if seen is not None:  # eigenvalues of a normalised Laplacian end at 2: what does not count comes behind them
            alone = torch.diag_embed((~seen).to(weight.dtype) * 2)
            laplacian = laplacian + alone
        vectors = torch.linalg.eigh(laplacian).eigenvectors[..., :width]
        if own is not None:
            vectors = vectors * (torch.arange(width, device=own.device) < own).unsqueeze(1)
        if seen is not None:
            vectors = vectors * seen.unsqueeze(2)
        return F.normalize(vectors, dim=2).float()


def _mean_square(squared: Tensor, both: Tensor | None) -> Tensor:
    """Mean squared distance of the pairs that count [B, 1, 1]."""
    if both is None:
        return squared.mean((1, 2), keepdim=True).clamp(min=1e-12)
    return ((squared * both).sum((1, 2), keepdim=True) / both.sum((1, 2), keepdim=True).clamp(min=1)).clamp(min=1e-12)
