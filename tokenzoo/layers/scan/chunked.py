"""Selective scan of all chunks of a sequence side by side: few, large steps, in plain differentiable operators.

Every chunk is scanned from a zero state, the products of its decays beside it; a short loop over the chunks then finds
the states they should have started from. The products only shrink, so nothing overflows. A sequence of L steps takes
about 2 sqrt(L) steps in turn, which suits GPUs and keeps exported graphs small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .call import ScanCall, Steps, finish, first_state, from_state, rates_of, steps


def chunked(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Output [B, D, L] and last state [B, D, N]; in training only the arguments are kept and the rest is recomputed."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or not torch.is_grad_enabled():
        return _chunked(call)
    return checkpoint(lambda *args: _chunked(ScanCall(*args)), *call, use_reentrant=False, preserve_rng_state=False)


def _chunked(call: ScanCall) -> tuple[Tensor, Tensor]:
    p, rates, length = steps(call), rates_of(call), call.u.shape[2]
    size = math.isqrt(length - 1) + 1  # steps of a chunk
    count = -(-length // size)
    p = Steps(p.u, *(_cut(x, size, count) for x in (p.decay, p.drive, p.B, p.C)))
    outputs, products = [], []
    h = product = None
    for i in range(size):
        a = torch.exp(p.decay[:, i] * rates)
        b = p.drive[:, i] * p.B[:, i].unsqueeze(-1)
        h = b if h is None else a * h + b
        product = a if product is None else product * a
        outputs.append(p.C[:, i].unsqueeze(-2) @ h)
        products.append(product)
    state, starts = first_state(call), []
    for chunk in range(count):
        starts.append(state)
        state = product[chunk] * state + h[chunk]
    start = torch.stack(starts)
    outputs = [y + p.C[:, i].unsqueeze(-2) @ (products[i] * start) for i, y in enumerate(outputs)]
    y = torch.stack(outputs, dim=1).flatten(0, 1)[:length].flatten(2)
    return finish(call, y, p.u), from_state(state)


def _cut(x: Tensor, size: int, count: int) -> Tensor:
    """[L, ...] -> [count, size, ...], filled up with zeros: steps that neither decay nor drive the state."""
    missing = size * count - x.shape[0]
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing])
    return x.unflatten(0, (count, size))
