"""What every form of the selective scan is called with, and the layout of its state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ScanCall(NamedTuple):
    """Checked arguments of one scan."""

    u: Tensor  # [B, D, L], as delta, z and decay
    delta: Tensor
    A: Tensor  # [D, N]
    B: Tensor  # [B, G, N, L], as C
    C: Tensor
    D: Tensor | None  # [D], as bias
    z: Tensor | None
    bias: Tensor | None
    decay: Tensor | None  # step that decays the state where it is not the one that drives it
    state: Tensor | None  # [B, D, N]
    softplus: bool


def compute_dtype(u: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which the types of a device's tensors are left alone; shape-only tensors have no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def rates_of(call: ScanCall) -> Tensor:
    """A in the layout of the state, [G, N, D / G], in the type the scan computes in."""
    return to_state(call.A.to(compute_dtype(call.u))[None], call.B.shape[1])[0].contiguous()


def first_state(call: ScanCall) -> Tensor:
    """The state before the first step in its inner layout [B, G, N, D / G], a new tensor."""
    (batch, dim, _), groups, work = call.u.shape, call.B.shape[1], compute_dtype(call.u)
    if call.state is None:
        return call.u.new_zeros((batch, groups, call.A.shape[1], dim // groups), dtype=work)
    return to_state(call.state.to(work), groups).clone(memory_format=torch.contiguous_format)


def to_state(x: Tensor, groups: int) -> Tensor:
    """[B, D, N] seen as [B, G, N, D / G]."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3)


def from_state(x: Tensor) -> Tensor:
    """[B, G, N, D / G] -> [B, D, N], contiguous."""
    return x.transpose(2, 3).flatten(1, 2)


class Steps(NamedTuple):
    """The pointwise part of a whole scan, time first, channels split into groups."""

    u: Tensor  # [L, B, D]
    decay: Tensor  # [L, B, G, 1, D / G], as drive
    drive: Tensor
    B: Tensor  # [L, B, G, N]
    C: Tensor


def steps(call: ScanCall) -> Steps:
    """Computes the pointwise part with differentiable operators."""
    work, shape = compute_dtype(call.u), (call.B.shape[1], 1, -1)
    u = call.u.to(work)
    dt = call.delta.to(work)
    if call.bias is not None:
        dt = dt + call.bias.to(work)[:, None]
    if call.softplus:
        dt = F.softplus(dt)
    decay = dt if call.decay is None else call.decay.to(work)
    first = [x.permute(2, 0, 1) for x in (u, decay, dt * u)]
    parameters = [x.to(work).permute(3, 0, 1, 2) for x in (call.B, call.C)]
    return Steps(first[0], *(x.unflatten(2, shape) for x in first[1:]), *parameters)


def finish(call: ScanCall, y: Tensor, u: Tensor) -> Tensor:
    """Skip and gate on the scan's output y [L, B, D]; returns [B, D, L] in the dtype of u."""
    if call.D is not None:
        y = y + call.D.to(y.dtype) * u
    y = y.permute(1, 2, 0)
    if call.z is not None:
        y = y * F.silu(call.z.to(y.dtype))
    return y.to(call.u.dtype)
