"""Matching for models that scan their tokens: alternate patches pair up, and what is left keeps its old order.

Pure tensor code; plans are those of `tokenzoo.ops.matching.bipartite`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bipartite import Pairs, best_partner, split_ranked

DISTANCES = ("cosine", "l1", "l2")
_ELEMENTS = 1 << 21  # differences an image that exist at a time where no kernel adds them up


def alternate_pairs(metric: Tensor, r: int, num_prefix: int, distance: str = "cosine") -> Pairs:
    """The r most alike pairs of patches at even and at odd places, places counted without the prefix.

    Every even patch proposes its nearest odd one; the r best proposals merge. The new order is [prefix, unmerged even
    patches by falling likeness, odd patches]; see `sort_pairs` for the old one.

    Args:
        metric: what likeness is measured on [B, N, D], prefix tokens in front.
        r: pairs to merge, at most (N - num_prefix) // 2.
        num_prefix: tokens at the front that stay out of it.
        distance: "cosine" similarity, or the "l1" or "l2" distance of the vectors scaled to length one.

    Raises:
        ValueError: an unknown distance.

    Source: Shi et al., "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training", 2024.
    """
    if distance not in DISTANCES:
        raise ValueError(f"alternate_pairs: distance={distance!r}; use one of {', '.join(DISTANCES)}")
    with torch.no_grad():
        unit = F.normalize(metric[:, num_prefix:].float(), dim=-1)
        even, odd = unit[:, 0::2], unit[:, 1::2]
        value, partner = _nearest(even, odd, distance)
        src, rest, _ = split_ranked(value, r, None, None)
    front = torch.arange(num_prefix, device=src.device).expand(src.shape[0], -1)
    odd_places = torch.arange(num_prefix + 1, metric.shape[1], 2, device=src.device).expand(src.shape[0], -1)
    order = torch.cat([front, 2 * rest + num_prefix, odd_places], dim=1)
    slot = partner.gather(1, src) + num_prefix + rest.shape[1]
    return Pairs(order, 2 * src + num_prefix, slot)


def _nearest(a: Tensor, b: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """Likeness and index [B, Na] of the b that each a is most like: a [B, Na, D], b [B, Nb, D]."""
    if distance == "cosine":
        return best_partner(a, b)
    if distance == "l2":
        # -|a - b|^2 as one product more: the order of distances, zero vectors included
        ones, squares = torch.ones_like(a[..., :1]), b.square().sum(-1, keepdim=True)
        value, index = best_partner(torch.cat([2 * a, -ones], dim=-1), torch.cat([b, squares], dim=-1))
        return value - a.square().sum(-1), index
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():  # ONNX has no operator for all distances
        rows = max(1, _ELEMENTS // (b.shape[1] * b.shape[2]))
        far = [(part.unsqueeze(2) - b.unsqueeze(1)).abs().sum(-1) for part in a.split(rows, dim=1)]
        value, index = torch.cat(far, dim=1).min(dim=2)
    else:
        value, index = torch.cdist(a, b, p=1).min(dim=2)
    return -value, index


def sort_pairs(pairs: Pairs) -> Pairs:
    """The same merges with the new tokens in the order of their heads, which is that of the sequence before.

    Args:
        pairs: a plan without padding.

    Returns:
        A plan whose `order` is strictly ascending.
    """
    order, back = pairs.order.sort(dim=1)
    return Pairs(order, pairs.src, back.argsort(dim=1).gather(1, pairs.slot))
