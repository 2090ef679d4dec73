"""Decisions over the frames of a video."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .deciding import deciding, top, unit


class Merged(NamedTuple):
    """New rows, windows of frames one behind the other, what stands still in each first.

    Attributes:
        x: values [K, C].
        slots: old row that lends each its place [K] int64, frames one behind the other.
        assign: new row of every old one [T * N] int64, -1 for dropped ones.
    """

    x: Tensor
    slots: Tensor
    assign: Tensor


@deciding
def frame_likeness(x: Tensor) -> Tensor:
    """Cosine of every row with that at the same place of the next frame: [T, N, C] -> [T - 1, N]."""
    units = unit(x)
    return (units[:-1] * units[1:]).sum(-1)


@deciding
def frame_windows(still: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Cuts a video so that as many rows as possible stand still within a window.

    Args:
        still: whether a place hardly changes to the next frame [T - 1, N] bool.

    Returns:
        First and last frame of each window, and how many rows they spare. Of equal ones short windows come first.
    """
    frames = len(still) + 1
    table, best, start = still.cpu(), [0] * (frames + 1), [0] * frames
    for last in range(frames):
        same, found = torch.ones_like(table[0]) if frames > 1 else None, -1
        for first in range(last, -1, -1):
            if first < last:
                same = same & table[first]
            gain = best[first] + (int(same.sum()) * (last - first) if first < last else 0)
            if gain > found:
                found, start[last] = gain, first
        best[last + 1] = found
    windows, last = [], frames - 1
    while last >= 0:
        windows.append((start[last], last))
        last = start[last] - 1
    return windows[::-1], best[frames]


@deciding
def density_peaks(x: Tensor, centres: int, neighbours: int = 7) -> tuple[Tensor, Tensor]:
    """Clusters around rows that are dense and far from denser ones.

    Args:
        x: [N, C].
        centres: how many.
        neighbours: rows that density is measured with, itself among them; at most `centres`.

    Returns:
        Centres, rising [centres] int64, and the cluster of every row [N] int64.
    """
    distance = torch.cdist(x.float(), x.float()) / math.sqrt(x.shape[1])
    near = distance.topk(min(neighbours, centres), dim=1, largest=False).values
    density = (-near.square().mean(1)).exp()
    denser = density[None] > density[:, None]
    delta = torch.where(denser, distance, distance.max()).amin(1)
    found = top((delta * density)[None], centres)[0]
    cluster = distance[:, found].argmin(1)
    cluster[found] = torch.arange(centres, device=x.device)
    return found, cluster


def holitom(
    x: Tensor, attention: Tensor, ratio: float, tau: float = 0.8, clustered: float = 0.0, beta: float | None = None,
    neighbours: int = 7,
) -> Merged:  # fmt: skip
    """Merges what stands still over windows of frames, and keeps of the rest what gets attention.

    Args:
        x: rows as the language model would see them [T, N, C].
        attention: that every row gets [T, N].
        ratio: share of all rows that stays, more or less: windows and frames round on their own.
        tau: cosine from one frame to the next above which a place stands still.
        clustered: share of what stays of moving rows that is clustered in place of ranked.
        beta: weight of the centre of a cluster against the mean of its others; None for the mean of all.
        neighbours: rows that the density of a cluster is measured with.

    Source: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025.
    """
    frames, n = x.shape[:2]
    still = frame_likeness(x) > tau
    windows, spared = frame_windows(still)
    rate = min(1.0, ratio / ((frames * n - spared) / (frames * n)))
    assign = torch.full((frames * n,), -1, device=x.device)
    values: list[Tensor] = []
    slots: list[Tensor] = []

    def add(new: Tensor, old: Tensor) -> None:
        slots.append(old)
        values.append(new)

    def cluster(rows: Tensor, places: Tensor, centres: int) -> None:
        """Clusters rows [m, C] that stand for old ones [copies, m]."""
        if centres == 0 or len(rows) == 0:
            return
        found, member = density_peaks(rows, centres, neighbours)
        assign[places] = member + sum(map(len, slots))
        add(_means(rows, found, member, beta), places[0, found])

    for first, last in windows:
        place = torch.arange(n, device=x.device)
        same = still[first:last].all(0) if last > first else torch.zeros(n, dtype=torch.bool, device=x.device)
        fixed, moving = place[same], place[~same]
        inside = torch.arange(first, last + 1, device=x.device)
        cluster(x[first : last + 1, fixed].mean(0), inside[:, None] * n + fixed, round(len(fixed) * rate))
        for frame in range(first, last + 1):
            count = math.ceil(len(moving) * rate)
            best = round(count * (1 - clustered))
            chosen = top(attention[frame, moving][None], best)[0]
            assign[frame * n + moving[chosen]] = torch.arange(best, device=x.device) + sum(map(len, slots))
            add(x[frame, moving[chosen]], frame * n + moving[chosen])
            other = torch.ones_like(moving, dtype=torch.bool).index_fill(0, chosen, False)
            cluster(x[frame, moving[other]], frame * n + moving[other][None], count - best)
    return Merged(torch.cat(values), torch.cat(slots), assign)


def _means(x: Tensor, centres: Tensor, member: Tensor, beta: float | None) -> Tensor:
    """Values of clusters [K, C] of x [N, C]."""
    belongs = (member == torch.arange(len(centres), device=x.device)[:, None]).to(x.dtype)
    if beta is None:
        return belongs @ x / belongs.sum(1, keepdim=True)
    belongs[torch.arange(len(centres), device=x.device), centres] = 0
    counts = belongs.sum(1, keepdim=True)
    mixed = beta * x[centres] + (1 - beta) * (belongs @ x) / counts.clamp(min=1)
    return torch.where(counts > 0, mixed, x[centres])
