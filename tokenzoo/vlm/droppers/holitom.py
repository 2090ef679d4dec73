"""holitom: once, by what the last word attends to; every dropped row goes into the kept one that it is most like."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ...core.options import number
from ..base import Dropper
from ..dropping import check_single
from ..layer_signals import LayerRows, LayerSignals, Left
from ..registry import register_dropper


@register_dropper
@dataclass(frozen=True, kw_only=True)
class HoliTom(Dropper):
    """Keeps once the visual rows that the last row of the prompt attends to most, and averages the others into them.

    The part of HoliTom inside the language model. Attention is that of the layer in front of the cut, mean over heads.
    Dropped rows go, one after the other, into the kept row with the largest cosine, by halves: later ones weigh more.
    Cosines are those of the values in front of all that. Published with original positions.

    Args:
        removed: share of the visual rows to drop.
        layers: the one layer that rows are dropped in front of; 18 of 28 by default, as in the published runs.

    Source: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025.
    """

    removed: float = number(0.5, "give the share of visual rows to drop", least=0, most=1)

    name = "holitom"
    source = "Shao et al., NeurIPS 2025"
    kind = "merge"
    scored_by = "previous"
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_single(self)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, round(depth * 18 / 28)),)

    def count(self, n: int, stage: int) -> int:
        return round(n * (1 - self.removed))

    def decide(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Left:
        left = rows.best(signals.attention())
        values = list(rows.x.unbind(0))
        for b, x in enumerate(values):
            kept = (rows.visual[b] & left.keep[b]).nonzero().flatten()
            rest = (rows.visual[b] & ~left.keep[b]).nonzero().flatten()
            if len(kept) and len(rest):
                values[b] = x.index_copy(0, kept, _by_halves(x[kept], x[rest]))
        return left._replace(x=torch.stack(values))

    def macs(self, n: int, text: int, dim: int, heads: int, stage: int) -> int:
        keep = min(n, self.count(n, stage))
        return (n + text) * heads + 2 * keep * (n - keep) * dim

    def dial(self, t: float) -> HoliTom:
        return replace(self, removed=t)


def _by_halves(kept: Tensor, rest: Tensor) -> Tensor:
    """Averages rows one after the other into those that they are most like.

    Of m rows that go into one, the i-th keeps the weight 2^-(m - i + 1), and the row itself 2^-m.

    Args:
        kept: [K, D].
        rest: [M, D].
    """
    with torch.no_grad():
        to = (normalize(rest.float(), dim=-1) @ normalize(kept.float(), dim=-1).T).argmax(1)
        goes = one_hot(to, len(kept))  # [M, K]
        so_far = goes.cumsum(0)
        later = (so_far[-1] - so_far).float()
        weight = goes * torch.exp2(-later - 1)
        own = torch.exp2(-so_far[-1].float()).unsqueeze(1)
    return kept * own.to(kept.dtype) + weight.to(kept.dtype).T @ rest
