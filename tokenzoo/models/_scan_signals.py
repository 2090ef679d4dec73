"""What a scanning mixer can tell about the tokens it has just mixed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class ScanSignals:
    """Intermediate values of one mixer; hand an empty one to its forward to have it filled.

    Tuples have one entry a scan direction; all entries list tokens in the order of the mixer's input.

    Attributes:
        delta: step sizes after bias and softplus, [B, D, L] each.
        raw_delta: step sizes before bias and softplus, [B, D, L] each.
        B: input projections of the state, [B, N, L] each.
        C: output projections of the state, [B, N, L] each.
        y: outputs of the scan before the gate, skip included, [B, D, L] each.
        gate: gate that all directions share, [B, D, L].
    """

    delta: tuple[Tensor, ...] | None = None
    raw_delta: tuple[Tensor, ...] | None = None
    B: tuple[Tensor, ...] | None = None
    C: tuple[Tensor, ...] | None = None
    y: tuple[Tensor, ...] | None = None
    gate: Tensor | None = None
