"""Depthwise convolution that sees only the past."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: bool = True) -> Tensor:
    """Convolve each channel with its own kernel over the last K positions, zeros before the first.

    Args:
        x: [B, D, L]; memory with the channels last (a transposed [B, L, D]) is kept so.
        weight: [D, 1, K] as `nn.Conv1d` stores it, or [D, K]; the last tap meets the present position.
        bias: [D].
        activation: Whether SiLU follows.

    Returns:
        [B, D, L].

    Raises:
        ValueError: A shape does not fit.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    if x.dim() != 3:
        raise ValueError(f"causal_conv1d: x must be [B, D, L], not {tuple(x.shape)}; put the channels before time")
    dim = x.shape[1]
    kernel = weight[:, None] if weight.dim() == 2 else weight
    if kernel.dim() != 3 or kernel.shape[:2] != (dim, 1):
        raise ValueError(
            f"causal_conv1d: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; "
            f"give [{dim}, 1, K] or [{dim}, K], one kernel a channel"
        )
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"causal_conv1d: bias {tuple(bias.shape)} does not fit x {tuple(x.shape)}; give [{dim}]")
    past = kernel.shape[-1] - 1
    if x.device.type == "cpu" and x.stride(1) == 1:  # a convolution of one row keeps the channels last: half the time
        rows = F.pad(x.transpose(1, 2), (0, 0, past, 0)).transpose(1, 2).unsqueeze(2)
        y = F.conv2d(rows, kernel.unsqueeze(2), bias, groups=dim).squeeze(2)
    else:
        y = F.conv1d(F.pad(x, (past, 0)), kernel, bias, groups=dim)
    # a traced graph is the same with and without gradients
    own = not torch.is_grad_enabled() and not torch.jit.is_tracing()
    return F.silu(y, inplace=own) if activation else y
