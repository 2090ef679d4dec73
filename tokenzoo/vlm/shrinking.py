"""Caches of layers in front of a cut, shortened to the rows that are left at the end: for droppers that ask for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cache import ReducedCache
from .gather import take
from .passing import Held, Span


def shrink_early_caches(layers: Sequence[nn.Module], cache: ReducedCache, span: Span) -> dict[int, Held]:
    """What layers hold behind a pass, and their caches without rows that have gone by the last layer.

    Taken out are rows of the layers from the one in front of the first cut of a dropper that shrinks caches on.

    Args:
        layers: of the language model.
        cache: that the pass has filled.
        span: of the pass.
    """
    held = span.after
    stages = [(i, stage.dropper) for i, layer in enumerate(layers) for stage in layer.tokenzoo_plan.stages]
    first = next((i for i, dropper in stages if dropper.shrinks_caches()), len(layers))
    final = held[len(layers) - 1]
    for i in range(first - 1, len(layers) - 1):
        own = held[i]
        if own is final:
            continue  # no cut lies behind it
        part = cache.layers[i]
        at = _places(own.cols, final.cols).to(part.keys.device)
        part.keys, part.values = (take(t.transpose(1, 2), at).transpose(1, 2) for t in (part.keys, part.values))
        held[i] = Held(final.cols, final.valid, own.dropped)  # its keys stay where they were turned to
    return held


def _places(cols: Tensor, wanted: Tensor) -> Tensor:
    """Where wanted columns [B, K] stand in a layer's own [B, P], which hold each of them once."""
    index = torch.arange(cols.shape[1], device=cols.device).expand_as(cols)
    table = torch.zeros(cols.shape[0], int(cols.max()) + 1, dtype=torch.int64, device=cols.device)
    return table.scatter(1, cols, index).gather(1, wanted)
