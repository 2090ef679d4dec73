"""Patches shared out softly among those that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps import KeepMap, SpreadMap
from ..ops.rows import take_rows
from .raster import in_raster_order
from .tokens import Tokens


def share_out(unit: Tensor, keep: KeepMap, tokens: Tokens, temperature: float, by_row: bool) -> SpreadMap:
    """The map from all patches to the kept ones by a softmax of cosines, these in raster order.

    Patches that a mask hides are shared out among hidden anchors alone, and go where there are none.

    Args:
        unit: features of length one [B, N, D] float32.
        keep: says which patches are anchors.
        tokens: the tokens.
        temperature: of the softmax.
        by_row: anchors are means of all patches, instead of patches shared out among anchors.
    """
    prefix, keep = tokens.layout.num_prefix, in_raster_order(keep, tokens)
    anchors = keep.idx[:, prefix:]
    logits = torch.bmm(take_rows(unit, anchors), unit[:, prefix:].transpose(1, 2)) / temperature  # [B, K, M]
    real, kind, seen = keep.valid, tokens.visible, None
    if real is not None:
        seen = real[:, prefix:].unsqueeze(2) & tokens.valid[:, prefix:].unsqueeze(1)
        # an image that keeps all of its patches keeps them as they are, as it would alone, where nothing is done
        own = anchors.unsqueeze(2) == torch.arange(prefix, tokens.length, device=anchors.device)
        seen = seen & (own | (real.sum(1) < tokens.valid.sum(1))[:, None, None])
    if kind is not None:
        alike = kind.gather(1, anchors).unsqueeze(2) == kind[:, prefix:].unsqueeze(1)
        seen = alike if seen is None else seen & alike
    shares = _softmax(logits, seen, 1)
    mass = tokens.sizes()[:, prefix:].transpose(1, 2)
    rows = _softmax(logits, seen, 2) if by_row else None
    return SpreadMap(keep.idx, shares, prefix, mass, rows, real)


def _softmax(logits: Tensor, seen: Tensor | None, dim: int) -> Tensor:
    """Softmax over what is seen, zero where nothing is."""
    if seen is None:
        return logits.softmax(dim)
    found = logits.masked_fill(~seen, float("-inf")).softmax(dim)
    return torch.where(seen.any(dim, keepdim=True), found, torch.zeros_like(found))
