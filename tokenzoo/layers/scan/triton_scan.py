"""Launches the Triton kernels of the selective scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import ScanCall, compute_dtype
from .tiles import PANEL

_CHANNELS = 16  # of a program: small, so that a batch of a small model still fills a GPU


def forward(call: ScanCall, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `scan_blocked.forward`."""
    from .kernels import forward_kernel

    batch, dim, length = call.u.shape
    states, groups, work = call.A.shape[1], call.B.shape[1], compute_dtype(call.u)
    out = call.u.new_empty((batch, length, dim))
    last = call.u.new_empty((batch, dim, states), dtype=work)
    kept = last.new_empty((-(-length // PANEL) if keep else 0, batch, dim, states))
    first = torch.zeros_like(last) if call.state is None else call.state.to(work).contiguous()
    if batch:
        with _device(call.u):
            forward_kernel[_programs(call)](
                *_arguments(call), first, out, last, kept, dim, length, states, groups,
                **_options(call), KEEP=keep,
            )  # fmt: skip
    # the kept states have the shape that blocked scans give them, not the layout: only `backward` below reads them
    return out.transpose(1, 2), last, kept.view(len(kept), batch, groups, states, dim // groups)


def backward(call: ScanCall, kept: Tensor, grad_out: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor, ...]:
    """As `scan_blocked_backward.backward`."""
    from .kernels import backward_kernel

    batch, dim, length = call.u.shape
    states, groups, work = call.A.shape[1], call.B.shape[1], compute_dtype(call.u)
    programs = _programs(call)
    options = _options(call)
    grad_out = call.u.new_zeros((batch, length, dim)) if grad_out is None else _time_first(grad_out)
    grad_last = kept.new_zeros((batch, dim, states)) if grad_last is None else grad_last.to(work).contiguous()

    def like(x: Tensor | None) -> Tensor:
        return _absent(kept) if x is None else x.new_empty((batch, length, dim))

    to_u, to_delta, to_decay, to_z = (like(x) for x in (call.u, call.delta, call.decay, call.z))
    to_a, to_first = torch.empty_like(grad_last), torch.empty_like(grad_last)
    to_b, to_c = (kept.new_empty((batch, length, programs[0], states)) for _ in range(2))
    to_skip, to_bias = (kept.new_empty((batch, dim)) for _ in range(2))
    scratch = kept.new_empty((programs[0] * batch, PANEL, _CHANNELS, options["STATES"]))
    if batch:
        with _device(call.u):
            backward_kernel[programs](
                *_arguments(call), kept, grad_out, grad_last,
                to_u, to_delta, to_decay, to_z, to_a, to_b, to_c, to_skip, to_bias, to_first, scratch,
                dim, length, states, groups, **options,
            )  # fmt: skip

    def summed(parts: Tensor, like: Tensor) -> Tensor:
        return parts.unflatten(2, (groups, -1)).sum(3).permute(0, 2, 3, 1).to(like.dtype).contiguous()

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if x.dim() == 3 else x

    return (
        turned(to_u), turned(to_delta), to_a.sum(0).to(call.A.dtype), summed(to_b, call.B), summed(to_c, call.C),
        _absent(kept) if call.D is None else to_skip.sum(0).to(call.D.dtype), turned(to_z),
        _absent(kept) if call.bias is None else to_bias.sum(0).to(call.bias.dtype), turned(to_decay),
        _absent(kept) if call.state is None else to_first.to(call.state.dtype),
    )  # fmt: skip


def _programs(call: ScanCall) -> tuple[int, int]:
    width = call.u.shape[1] // call.B.shape[1]
    return call.B.shape[1] * -(-width // _CHANNELS), call.u.shape[0]


def _arguments(call: ScanCall) -> list[Tensor]:
    """Streams, parameters, skip and bias as the kernels read them; an absent one is stood in for and never read."""
    work = compute_dtype(call.u)
    u, delta, A = _time_first(call.u), _time_first(call.delta), call.A.to(work).contiguous()
    decay, z = (u if x is None else _time_first(x) for x in (call.decay, call.z))
    B, C = (x.permute(0, 3, 1, 2).contiguous() for x in (call.B, call.C))
    skip, bias = (A if x is None else x.to(work).contiguous() for x in (call.D, call.bias))
    return [u, delta, decay, z, A, B, C, skip, bias]


def _absent(kept: Tensor) -> Tensor:
    """A new empty tensor: outputs of an operator must not share memory."""
    return kept.new_empty(0)


def _options(call: ScanCall) -> dict[str, Any]:
    return {
        "HAS_DECAY": call.decay is not None,
        "HAS_GATE": call.z is not None,
        "HAS_SKIP": call.D is not None,
        "HAS_BIAS": call.bias is not None,
        "SOFTPLUS": call.softplus,
        "PANEL": PANEL,
        "CHANNELS": _CHANNELS,
        "STATES": 1 << (call.A.shape[1] - 1).bit_length(),
        "num_warps": 1,
    }


def _time_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _device(x: Tensor) -> Any:
    """The device that kernels are launched on."""
    return torch.cuda.device_of(x)
