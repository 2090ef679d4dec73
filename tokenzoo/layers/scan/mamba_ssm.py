"""Selective scan by the CUDA kernel of the package mamba_ssm, where a user has it."""

from __future__ import annotations

from torch import Tensor

from .call import without_autocast


def mamba_ssm_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, D, L] and last state [B, D, N] in float32; arguments as `selective_scan` takes them.

    The kernel wants its streams in one type, the parameters of the channels in float32.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    with without_autocast(u):
        streams = [None if x is None else x.to(u.dtype) for x in (delta, z)]
        B, C = (x.float() if x.dim() == 2 else x.to(u.dtype) for x in (B, C))
        out, last = selective_scan_fn(
            u, streams[0], A.float(), B, C,
            None if D is None else D.float(), streams[1], None if delta_bias is None else delta_bias.float(),
            delta_softplus, return_last_state=True,
        )  # fmt: skip
    return out, last.float()
