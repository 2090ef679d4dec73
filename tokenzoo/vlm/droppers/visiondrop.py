"""visiondrop: in stages, by what visual rows attend to among themselves; the rest is merged into a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.options import choice, option
from ..base import Dropper
from ..dropping import check_stages, even_layers
from ..layer_signals import LayerRows, LayerSignals, Left
from ..registry import register_dropper

_PUBLISHED = ((30 / 48, 5 / 48), (22 / 48, 4 / 48), (16 / 48, 3 / 48))  # of the 48 rows that its tower stage leaves


def _pairs(name: str, field: str, value: Any) -> tuple[tuple[float, float], ...]:
    """(dominant, contextual) per stage, all counts or all shares, with totals that do not rise."""
    hint = "give (dominant, contextual) per layer, counts such as ((30, 5), (16, 3)) or shares ((0.6, 0.1), (0.3, 0.1))"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TypeError(f"{name}: {field}={value!r}; {hint}")
    pairs = tuple(tuple(pair) if isinstance(pair, (list, tuple)) else () for pair in value)
    kinds = {type(each) for pair in pairs for each in pair}
    if any(len(pair) != 2 for pair in pairs) or kinds not in ({int}, {float}):
        raise TypeError(f"{name}: {field}={value!r}; {hint}")
    totals = [sum(pair) for pair in pairs]
    if min(map(min, pairs)) < 0 or any(b > a for a, b in zip(totals, totals[1:])):
        raise ValueError(f"{name}: {field}={pairs}; numbers are negative or rise from stage to stage; {hint}")
    if kinds == {float} and totals[0] > 1 + 1e-9:
        raise ValueError(f"{name}: {field}={pairs}; shares of a stage add up to {totals[0]}, above 1; {hint}")
    return pairs


@register_dropper
@dataclass(frozen=True, kw_only=True)
class VisionDrop(Dropper):
    """Keeps in stages the visual rows that visual rows attend to most, and merges the others into contextual rows.

    Attention is what the layer behind the cut makes of the rows in front of it, causal, mean over heads and visual
    rows. Contextual rows are targets at equal distances among the others; every one left is added to the target with
    the most alike key (with rotary positions, mean over heads), as a mean, which about doubles the norm, as published.
    Published behind `visiondrop_tower`, for 32 layers, with contiguous positions and `order="published"`.

    Args:
        kept: (dominant, contextual) rows behind each stage: counts, or shares of the visual rows at the entry.
        order: "raster": a contextual row stands where its target stood; "published": contextual rows stand behind all
            others, so that rows trade places, which is of use with contiguous positions only.
        layers: layers that rows are dropped in front of, one per pair; at equal distances by default, which is
            (8, 16, 24) of 32 for three.

    Source: Xu et al., "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", AAAI 2026.
    """

    kept: tuple[tuple[float, float], ...] = option(_PUBLISHED, _pairs)
    order: str = choice("raster", ("raster", "published"))

    name = "visiondrop"
    source = "Xu et al., AAAI 2026"
    kind = "merge"
    scored_by = "own"
    positions = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self, "kept")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return even_layers(depth, len(self.kept))

    def count(self, n: int, stage: int) -> int:
        total = sum(self.kept[stage])
        return min(n, round(total * n) if isinstance(total, float) else total)

    def _contextual(self, keep: int, stage: int) -> int:
        dominant, contextual = self.kept[stage]
        return round(keep * contextual / (dominant + contextual)) if keep else 0

    def decide(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Left:
        score = signals.attention(rows.visual)
        with torch.no_grad():
            keys = normalize(signals.reading.keys().float().mean(1), dim=-1)  # [B, N, d]
        stay, values = rows.visual.clone(), list(rows.x.unbind(0))
        for b, keep in enumerate(rows.keep):
            here = rows.visual[b].nonzero().flatten()
            if keep >= len(here):
                continue
            contextual = self._contextual(keep, stage)
            ranked = score[b, here].sort(descending=True, stable=True).indices
            dominant = here[ranked[: keep - contextual].sort().values]
            rest = here[ranked[keep - contextual :].sort().values]
            heads, merged = _contextual_rows(values[b], keys[b], rest, contextual)
            slots = torch.cat([dominant, heads])
            new = torch.cat([values[b][dominant], merged])
            stay[b] = False
            stay[b, slots] = True
            if self.order == "published":
                slots = slots.sort().values
            values[b] = values[b].index_copy(0, slots, new)
        return Left(stay, torch.stack(values))

    def macs(self, n: int, text: int, dim: int, heads: int, stage: int) -> int:
        keep = min(n, self.count(n, stage))
        contextual = self._contextual(keep, stage) if keep < n else 0
        return n * (n + text) * heads + (n - keep) * contextual * heads

    def dial(self, t: float) -> VisionDrop:
        shares = [(1 - t) ** (i + 1) for i in range(len(self.kept))]
        return replace(self, kept=tuple((share * 6 / 7, share / 7) for share in shares))


def _contextual_rows(x: Tensor, keys: Tensor, rest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows that take in others.

    Args:
        x: [N, D].
        keys: [N, d] of norm 1.
        rest: rows that are targets or members, in order [M].
        count: how many targets.

    Returns:
        Targets [count] and their new values [count, D].
    """
    if not count:
        return rest[:0], x[:0]
    step = max(1, len(rest) // count)
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=x.device)
    is_target[torch.arange(0, len(rest), step, device=x.device)[:count]] = True
    targets, members = rest[is_target], rest[~is_target]
    if not len(members):
        return targets, x[targets]
    to = (keys[members] @ keys[targets].T).argmax(1)
    mean = torch.zeros_like(x[targets]).index_add(0, to, x[members])
    size = torch.bincount(to, minlength=count).clamp(min=1).unsqueeze(1)
    return targets, x[targets] + mean / size
