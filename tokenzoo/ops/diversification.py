"""A loss that keeps attention from falling on a few tokens: rows of a map should not be like their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def layer_likeness(attention: Tensor, threshold: float = 2.0) -> Tensor:
    """How much the rows of one layer's attention are like their mean, a scalar in [0, 1].

    Entries of the head-mean map, and of its mean over queries, count where they exceed threshold / N; gradients pass
    through those alone. 0 where no token receives that much. The released code takes a wrong axis at a batch of one;
    here one image is what it is in a larger batch.

    Args:
        attention: softmaxed maps [B, H, N, N].
        threshold: in shares of even attention.

    Raises:
        ValueError: maps of another shape.
    """
    if attention.dim() != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(f"attention of shape {tuple(attention.shape)}; give maps [B, H, N, N]")
    rows = attention.mean(1)
    mean = rows.mean(1, keepdim=True)
    least = threshold / attention.shape[3]
    rows, mean = rows * (rows > least), mean * (mean > least)
    return F.cosine_similarity(mean, rows, dim=2, eps=1e-8).mean()


def attention_diversification(maps: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """The attention diversification loss over all layers, a scalar.

    Args:
        maps: softmaxed maps [B, H, N, N] of every layer; their number of tokens may differ.
        threshold: see `layer_likeness`.

    Raises:
        ValueError: no map, or maps of another shape.

    Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
    """
    if not maps:
        raise ValueError("attention_diversification: there is no map; give the attention of one layer at least")
    return sum(layer_likeness(each, threshold) for each in maps) / (len(maps) + 1e-6)
