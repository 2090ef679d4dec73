"""llavolta: visual rows are averaged in stretches of equal length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...core.options import number
from ..base import Dropper
from ..dropping import check_single
from ..layer_signals import LayerRows, LayerSignals, Left
from ..registry import register_dropper


@register_dropper
@dataclass(frozen=True, kw_only=True)
class LLaVolta(Dropper):
    """Averages visual rows once over stretches of equal length in the order in which they stand.

    A mean stands at the mean position of its stretch, rounded down (the authors average positions in half precision,
    which rounds differently from 1024 on). No stretch reaches over words: of each unbroken run of visual rows, those
    that fill no stretch at its end are dropped, as published for the one image. Made for training, where the stride
    falls and the layer rises until nothing is averaged any more.

    Args:
        stride: rows per stretch.
        layers: the one layer that rows are averaged in front of; 2 by default.

    Source: Chen et al., "Efficient Large Multi-modal Models via Visual Context Compression", NeurIPS 2024.
    """

    stride: int = number(8, "give the number of rows per stretch", least=1, whole=True)

    name = "llavolta"
    source = "Chen et al., NeurIPS 2024"
    kind = "merge"
    scored_by = "none"
    positions = "original"
    data_dependent = True  # runs that no stretch fills leave fewer than their rows together would

    def __post_init__(self) -> None:
        super().__post_init__()
        check_single(self)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return (2,)

    def count(self, n: int, stage: int) -> int:
        return n // self.stride

    def decide(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Left:
        stay, values = torch.zeros_like(rows.visual), list(rows.x.unbind(0))
        for b, x in enumerate(values):
            here = rows.visual[b].nonzero().flatten()
            runs = here.tensor_split(((here[1:] - here[:-1]) != 1).nonzero().flatten().cpu() + 1)
            counts = [len(run) // self.stride for run in runs]
            whole = [run[: n * self.stride].view(n, self.stride) for run, n in zip(runs, counts)]
            index = torch.cat(whole)  # [stretches, stride]
            slots = index[:, (self.stride - 1) // 2]
            stay[b, slots] = True
            values[b] = x.index_copy(0, slots, x[index].mean(1))
        return Left(stay, torch.stack(values))

    def dial(self, t: float) -> LLaVolta:
        return replace(self, stride=max(1, round(1 / max(1 - t, 1e-6))))
