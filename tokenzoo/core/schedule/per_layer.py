"""Counts and rates per layer from the forms in which options give them, and keep rates over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def removed_per_layer(r: int | Sequence[int] | tuple[int, float] | Mapping[str, float], depth: int) -> list[int]:
    """Tokens to remove in every block, in the forms of ToMe (Bolya et al., ICLR 2023).

    Args:
        r: an int for all blocks; a list with one entry per block, missing ones are 0; or (r, slope) with slope in
            [-1, 1], also written {"r": r, "slope": slope}: a line from r * (1 - slope) at the first block to
            r * (1 + slope) at the last, (r, -1.0) being the decreasing schedule from 2r to 0.
        depth: number of blocks the counts are for.

    Raises:
        ValueError: more entries than blocks, a negative count, or a slope outside [-1, 1].
        TypeError: another form.
    """
    if isinstance(r, Mapping):
        if set(r) != {"r", "slope"}:
            raise ValueError(f"r={dict(r)}: a mapping needs exactly the keys 'r' and 'slope'")
        r = (r["r"], float(r["slope"]))
    if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        mean, slope = r
        if not -1 <= slope <= 1:
            raise ValueError(f"r={r}: the slope must lie in [-1, 1]")
        low = int(mean * (1 - slope))
        step = (2 * mean - 2 * low) / (depth - 1) if depth > 1 else 0.0
        counts = [int(low + step * i) for i in range(depth)]
    elif isinstance(r, int) and not isinstance(r, bool):
        counts = [r] * depth
    elif isinstance(r, Sequence) and not isinstance(r, str) and all(type(i) is int for i in r):
        if len(r) > depth:
            raise ValueError(f"r has {len(r)} entries for {depth} blocks; give at most one per block")
        counts = [*r, *([0] * (depth - len(r)))]
    else:
        raise TypeError(f"r={r!r}: give an int, a list of ints, or (r, slope) with a float slope")
    if any(c < 0 for c in counts):
        raise ValueError(f"r={r!r} asks for a negative number of tokens to remove")
    return counts


def spread(value: Any, layers: Sequence[int], what: str) -> dict[int, Any]:
    """One value per layer: a scalar is repeated, a sequence must have one entry per layer.

    Args:
        value: scalar or sequence.
        layers: block indices.
        what: the option's name, for the error.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(layers):
            raise ValueError(f"{what} has {len(value)} entries for {len(layers)} layers {tuple(layers)}; give one each")
        return dict(zip(layers, value))
    return {layer: value for layer in layers}


def keep_count(rate: float, n: int) -> int:
    """ceil(rate * n) of the double product, the rounding of EViT (Liang et al., ICLR 2022)."""
    return math.ceil(rate * n)


def truncated(rate: float, n: int) -> int:
    """rate * n rounded down, one at least: the rounding of p-MoD (Zhang et al., ICCV 2025)."""
    return max(1, int(rate * n))


def depth_shares(depth: int, form: str = "cosine") -> list[float]:
    """A share per block that falls from 1 to 0, a half on the average: half a cosine, or a line.

    Args:
        depth: number of blocks.
        form: "cosine" or "linear".

    Source: Zhang, Meng, Lu et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025.
    """
    if form not in ("cosine", "linear"):
        raise ValueError(f"form={form!r}; use 'cosine' or 'linear'")
    places = [i / max(1, depth - 1) for i in range(depth)]
    return [0.5 + 0.5 * math.cos(math.pi * t) if form == "cosine" else 1 - t for t in places]


def decayed_keep_rates(depth: int, form: str = "cosine", most: float = 0.85, least: float = 0.15) -> tuple[float, ...]:
    """Progressive ratio decay: keep rates of all blocks, 1 where the share is above `most`, never below `least`.

    Args:
        depth, form: see `depth_shares`.
        most: blocks with a larger share keep all.
        least: smallest rate.

    Source: Zhang, Meng, Lu et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025.
    """
    return tuple(1.0 if share > most else max(share, least) for share in depth_shares(depth, form))


def cosine_keep_rate(iteration: int, epoch: int, steps_per_epoch: int, start: int, length: int, target: float) -> float:
    """Keep rate during training: 1 until `start`, a half cosine down to `target`, then `target` (EViT, ICLR 2022).

    Args:
        iteration: global step.
        epoch: epoch of that step.
        steps_per_epoch: steps in an epoch.
        start: first epoch that reduces.
        length: epochs of the descent.
        target: final keep rate.
    """
    if epoch < start:
        return 1.0
    if epoch >= start + length:
        return target
    progress = (iteration - steps_per_epoch * start) / (steps_per_epoch * length)
    return target + (1 - target) * 0.5 * (1 + math.cos(math.pi * progress))


def even_removal(t: float, capacity: int, blocks: int) -> list[int]:
    """Counts for a relative strength: the same number per block, the rest spread over the first blocks.

    Args:
        t: 0 to 1, share of `capacity`.
        capacity: most tokens one block may remove.
        blocks: number of blocks.
    """
    total = round(t * capacity * blocks)
    return [total // blocks + (i < total % blocks) for i in range(blocks)]
