"""Patches shared out softly among those that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps import KeepMap, SpreadMap
from ..ops.rows import take_rows
from .raster import in_raster_order
from .tokens import Tokens


def cosine_temperature(unit: Tensor, tokens: Tokens, sharpness: float) -> Tensor:
    """The temperature at which the usual distance of an image's patches, one minus their cosine, counts `sharpness`.

    Absolute temperatures fit one model: the usual distance of keys is 0.7 in one trained model and 0.02 in another.

    Args:
        unit: features of length one [B, N, D] float32.
        tokens: the tokens; what a mask hides, and padding, decide nothing.
        sharpness: what that distance is to count in the exponent.

    Returns:
        [B, 1, 1], as `unit`.
    """
    patches, seen = unit.detach()[:, tokens.layout.num_prefix :], tokens.seen_patches
    if seen is None:
        mean = patches.mean(1)
    else:
        mean = (patches * seen.unsqueeze(2)).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
    # the mean over all pairs; where patches coincide, all that is left is rounding, which must not be blown up
    usual = (1 - mean.square().sum(1)).clamp(min=1e-5)
    return (usual / sharpness).view(-1, 1, 1)


def share_out(unit: Tensor, keep: KeepMap, tokens: Tokens, temperature: float | Tensor, by_row: bool) -> SpreadMap:
    """The map from all patches to the kept ones by a softmax of cosines, these in raster order.

    Patches that a mask hides are shared out among hidden anchors alone, and go where there are none.

    Args:
        unit: features of length one [B, N, D] float32.
        keep: says which patches are anchors.
        tokens: the tokens.
        temperature: of the softmax, one or [B, 1, 1].
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
