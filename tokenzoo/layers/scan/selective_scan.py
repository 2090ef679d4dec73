"""Selective scan: a linear recurrence whose coefficients depend on the token."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import resolve_backend
from .call import ScanCall, without_autocast
from .chunked import chunked
from .grad import scan
from .loop import loop


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    decay_dt: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan the tokens of each channel with `h = exp(dt A) h + dt B u`, `y = C h + D u`, gated by `silu(z)`.

    `dt = softplus(delta + delta_bias)`, without the softplus if `delta_softplus` is False. Everything is computed in
    float32 (float64 for float64 inputs), under autocast too. Forms "blocked" and "triton" keep only the inputs and the
    state before every 32nd step for the gradient; "chunked" keeps the inputs, "loop" every state.

    Args:
        u: [B, D, L]; memory with the channels last (a transposed [B, L, D]) is read without a copy.
        delta: [B, D, L], step sizes before bias and softplus.
        A: [D, N], real and negative.
        B: [B, N, L], or [B, G, N, L] for G groups of D / G neighbouring channels, or constant [D, N].
        C: As B.
        D: [D], skip connection.
        z: [B, D, L], gate.
        delta_bias: [D].
        delta_softplus: Whether steps go through softplus.
        return_last_state: Whether the last state is returned too.
        initial_state: [B, D, N] before the first step, zeros if None.
        decay_dt: [B, D, L], final step sizes that decay the state, in place of dt; dt still drives it.
        backend: One of `scan_backends.BACKENDS`, or None to choose.

    Returns:
        [B, D, L] in the dtype of u, channels last in memory; with `return_last_state` also [B, D, N] in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: A shape, dtype or device does not fit, or the backend cannot serve the call.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    tensors = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state, "decay_dt": decay_dt,
    }  # fmt: skip
    _check(tensors)
    name = resolve_backend(backend, u, own_decay=decay_dt is not None, resumed=initial_state is not None)
    if name == "mamba_ssm":
        from .mamba_ssm import mamba_ssm_scan

        out, last = mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (out, last) if return_last_state else out
    groups = max(_groups(B, u), _groups(C, u))
    call = ScanCall(
        u, delta, A, _grouped(B, groups, u), _grouped(C, groups, u), D, z, delta_bias, decay_dt, initial_state,
        delta_softplus,
    )  # fmt: skip
    with without_autocast(u):
        if name in ("loop", "chunked"):
            out, last = (loop if name == "loop" else chunked)(call)
        else:
            keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors.values())
            out, last, _ = scan(*call, keep, name)
    return (out, last) if return_last_state else out


def _groups(x: Tensor, u: Tensor) -> int:
    """Groups of channels that share a row of B or C; constant ones differ from channel to channel."""
    return {2: u.shape[1], 3: 1}.get(x.dim(), x.shape[1])


def _grouped(x: Tensor, groups: int, u: Tensor) -> Tensor:
    """B or C as [B, G, N, L]."""
    if x.dim() == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    x = x.unsqueeze(1) if x.dim() == 3 else x
    return x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], dim=1)


def _check(tensors: dict[str, Tensor | None]) -> None:
    """Raises for arguments that do not fit together."""
    u, A = tensors["u"], tensors["A"]
    for name, x in tensors.items():
        if x is None:
            continue
        if x.is_complex():
            raise ValueError(
                f"selective_scan: {name} is complex ({x.dtype}); the S4-style complex scan is not built, give a real "
                f"{name}"
            )
        if not x.is_floating_point():
            raise ValueError(f"selective_scan: {name} is {x.dtype}; convert it to a floating-point type")
        if x.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {x.device}, u on {u.device}; move {name} to {u.device}")
    if u.dim() != 3 or u.shape[1] == 0 or u.shape[2] == 0:
        raise ValueError(f"selective_scan: u is {tuple(u.shape)}; give [B, D, L] with at least one channel and step")
    batch, dim, length = u.shape
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"selective_scan: A is {tuple(A.shape)}; give [{dim}, N], one row per channel of u")
    states = A.shape[1]
    wanted = {"initial_state": (batch, dim, states), "D": (dim,), "delta_bias": (dim,)}
    for name in ("delta", "z", "decay_dt", *wanted):
        x, shape = tensors[name], wanted.get(name, (batch, dim, length))
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} is {tuple(x.shape)}; give {list(shape)} to go with u {tuple(u.shape)} and A "
                f"{tuple(A.shape)}"
            )
    found = []
    for name in ("B", "C"):
        x = tensors[name]
        fits = {2: (dim, states), 3: (batch, states, length), 4: (batch, *x.shape[1:2], states, length)}.get(x.dim())
        if fits is None or tuple(x.shape) != fits:
            raise ValueError(
                f"selective_scan: {name} is {tuple(x.shape)}; give [{batch}, {states}, {length}], "
                f"[{batch}, G, {states}, {length}] or constant [{dim}, {states}]"
            )
        found.append(_groups(x, u))
        if found[-1] == 0 or dim % found[-1]:
            raise ValueError(
                f"selective_scan: {name} is {tuple(x.shape)}: its {found[-1]} groups do not divide the {dim} channels "
                "of u; choose a number of groups that does"
            )
    if max(found) % min(found):
        raise ValueError(
            f"selective_scan: B has {found[0]} groups and C {found[1]}; give both the same number, or one a multiple "
            "of the other"
        )
