"""Sinkhorn's algorithm on logarithms."""

from __future__ import annotations

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, iterations: int, counts: Tensor | None = None) -> Tensor:
    """Shares tokens out among centres by a plan whose columns sum to one, and rows to about N / K.

    Both marginals are 1 / (N + K), as released; they agree only for N = K, and the columns have the last word.

    Args:
        logits: likeness of centres and tokens, over its softness [B, K, N].
        iterations: times that rows, then columns are brought to their sums.
        counts: tokens that count [B, N] bool, None for all; where none does, all do. Others get nothing.

    Returns:
        [B, K, N].

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013.
    """
    if counts is not None:
        counts = (counts | ~counts.any(1, keepdim=True)).unsqueeze(1)
        logits = logits.masked_fill(~counts, torch.finfo(logits.dtype).min)
        total = counts.sum(2, keepdim=True).to(logits.dtype) + logits.shape[1]
    else:
        total = logits.new_tensor(float(logits.shape[1] + logits.shape[2]))
    each, columns = -total.log(), torch.zeros_like(logits[:, :1])
    for _ in range(iterations):
        rows = each - (logits + columns).logsumexp(2, keepdim=True)
        columns = each - (logits + rows).logsumexp(1, keepdim=True)
        if counts is not None:
            columns = columns.masked_fill(~counts, 0.0)  # those that do not count stay out of the rows
    return (logits + rows + columns).exp() * total
