"""Scores of patches from an attention map, under the names of GTP-ViT (Xu et al., WACV 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.map_reading import MapStatistics
from .signals import Signals

_BOTH = ("MixedAttn", "DiagAttn", "IMGAttn", "CLSAttn", "CosSim")
SELECTIONS = (*(f"{name}{over}" for name in _BOTH for over in ("Max", "Mean")), "SumAttnMax")


def map_scores(selection: str, found: MapStatistics | Tensor, prefix: int) -> Tensor:
    """Scores of the patches [B, M].

    Args:
        selection: one of `SELECTIONS`: a quantity, and how it is put together over heads.
        found: what was read of the map; for "CosSim" the map [B, H, N, N], for "CLSAttn" its first row [B, H, N].
        prefix: prefix tokens in front.
    """
    name, over = (selection[:-3], torch.amax) if selection.endswith("Max") else (selection[:-4], torch.mean)
    if name == "CosSim":
        unit = F.normalize(over(found, 1)[:, prefix:], dim=2)
        return -(unit @ unit.sum(1).unsqueeze(2)).squeeze(2)
    if name == "CLSAttn":
        return over(found, 1)[:, prefix:]
    own, received = (over(part, 1)[:, prefix:] for part in (found.own, found.received))
    return {"DiagAttn": own, "IMGAttn": received, "SumAttn": own + received}.get(name, own * received)


def selection_scores(selection: str, signals: Signals, prefix: int) -> Tensor:
    """The same of the current patches of a block, reading no more of its map than the selection needs."""
    seen = signals.seen
    if selection.startswith("CosSim"):
        rows, asking = signals.attention if seen is None else seen.rows, signals.asking
        rows = rows if asking is None else rows.masked_fill(~asking[:, None, :, None], 0)
        found = map_scores(selection, rows, prefix)
        return signals.pooled(F.pad(found, (prefix, 0)).unsqueeze(2)).squeeze(2)[:, prefix:]
    if selection.startswith("CLS"):
        return map_scores(selection, signals.class_attention if seen is None else signals.map_statistics.first, prefix)
    return map_scores(selection, signals.map_statistics, prefix)
