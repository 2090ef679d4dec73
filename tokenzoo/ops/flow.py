"""How information flows to patches: scores from class attention and values, and how evenly attention is spread."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flow_scores(attention: Tensor, alike: Tensor | None, values: Tensor) -> Tensor:
    """Attention and likeness in shares, times the length of the value [B, M].

    Args:
        attention: to every patch [B, M], not negative; 0 for those that count for nothing.
        alike: softmax of the class token's value with every patch's [B, M]; None without a class token.
        values: mean over heads [B, M, D].
    """
    shares = _shares(attention) if alike is None else _shares(attention) + _shares(alike)
    return shares * values.abs().sum(2)


def value_likeness(values: Tensor, num_prefix: int, seen: Tensor | None) -> Tensor:
    """Softmax of the products of the class token's value with all values, mean over heads, patches alone [B, M].

    Args:
        values: [B, N, H, D], class token first.
        num_prefix: prefix tokens in front of the patches; they count in the softmax.
        seen: tokens that count [B, N] bool; None for all.
    """
    per_head = values.transpose(1, 2)  # [B, H, N, D]
    logits = (per_head @ per_head[:, :, :1].transpose(2, 3)).squeeze(3)  # [B, H, N], not scaled
    if seen is not None:
        logits = logits.masked_fill(~seen.unsqueeze(1), float("-inf"))
    return logits.softmax(2).mean(1)[:, num_prefix:]


def evenness(attention: Tensor, counts: int | Tensor) -> Tensor:
    """Entropy of attention in shares, by its largest value [B, 1] float64: 1 where all patches have the same.

    Args:
        attention: to every patch [B, M], not negative.
        counts: patches of each image [B, 1], or one number.
    """
    entropy = torch.special.entr(_shares(attention.double())).sum(1, keepdim=True)
    most = counts.double().log() if isinstance(counts, Tensor) else torch.full_like(entropy, math.log(max(counts, 1)))
    return torch.where(most > 0, entropy / most.clamp(min=1e-12), torch.ones_like(entropy))


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
