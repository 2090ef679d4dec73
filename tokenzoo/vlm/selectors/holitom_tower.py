"""holitom_tower: what stands still in a video is merged over frames (HoliTom outside of the language model)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.options import number
from ..base import Selector
from ..functional import holitom
from ..registry import register_selector
from ..rows import NewRows, VisualRows
from ..signals import VisualSignals


@register_selector
@dataclass(frozen=True, kw_only=True)
class HoliTomTower(Selector):
    """Merges rows that stand still over windows of frames, and keeps of the others those that get attention.

    HoliTom outside of the language model. A video is cut where that spares most rows; places that stand still in a
    window become their mean, clustered by density peaks; of the others each frame keeps the best. Windows and frames
    round on their own, so that `keep` is met more or less. The released code adds noise to densities, which breaks ties
    by chance; here the first row counts as denser. Images, and crops of unequal size, are one frame.

    Args:
        tau: cosine from one frame to the next above which a place stands still; 0.65 was published for 10 %.
        clustered: share of what stays of moving rows that is clustered in place of ranked.
        beta: weight of the centre of a cluster against the mean of its others; None for the mean of all.

    Source: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025.
    """

    tau: float = number(0.8, "give a cosine such as 0.8")
    clustered: float = number(0.0, "give a share", least=0, most=1)
    beta: float | None = number(None, "give a weight such as 0.6, or None", least=0, most=1, none=True)

    name = "holitom_tower"
    source = "Shao et al., NeurIPS 2025"
    kind = "merge"
    unit = "image"
    reads = ("tower",)
    data_dependent = True

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> NewRows:
        score, ratio = signals.importance(-2), keep / rows.length * (1 - 1e-9)  # whole numbers must not be rounded up
        found = []
        for b, x in enumerate(rows.x):
            frames = _frames(None if rows.part is None else rows.part[b])
            options = (ratio, self.tau, self.clustered, self.beta)
            found.append(holitom(x.unflatten(0, (frames, -1)), score[b].view(frames, -1), *options))
        length = max(len(each.slots) for each in found)
        # videos with fewer rows repeat one of theirs, which changes nothing
        at = [torch.arange(length, device=score.device).clamp(max=len(each.slots) - 1) for each in found]
        new = (torch.stack([getattr(each, name)[i] for each, i in zip(found, at)]) for name in ("x", "slots"))
        return NewRows(*new, torch.stack([each.assign for each in found]))

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        return n * n * heads + n * dim


def _frames(part: Tensor | None) -> int:
    """How many frames of equal size rows make, one behind the other; 1 where they do not."""
    if part is None:
        return 1
    frames = int(part.max()) + 1
    even = torch.arange(frames, device=part.device).repeat_interleave(len(part) // frames)
    return frames if torch.equal(even, part) else 1
