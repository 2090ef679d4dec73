"""Selective scan as it is written down, one step after the other: the slow and obvious form."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import ScanCall, finish, first_state, from_state, rates_of, steps


def loop(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output [B, D, L] and last state [B, D, N]; gradients come from autograd, which keeps every state."""
    p, rates, h = steps(call), rates_of(call), first_state(call)
    rows = []
    for decay, drive, b, c in zip(p.decay, p.drive, p.B, p.C):
        h = torch.exp(decay * rates) * h + drive * b.unsqueeze(-1)
        rows.append(c.unsqueeze(-2) @ h)
    y = torch.stack(rows).flatten(2)
    return finish(call, y, p.u), from_state(h)
