"""The scan as one differentiable operator that keeps its inputs and few states, opaque to `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blocked as scan_blocked
from . import blocked_backward as scan_blocked_backward
from .call import ScanCall, compute_dtype, without_autocast
from .tiles import PANEL

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? decay, Tensor? state"  # noqa: E501
_OUTPUTS = "Tensor, Tensor, Tensor"
_GRADIENTS = ", ".join(["Tensor"] * 10)
_COUNT = 10  # tensor inputs


@torch.library.custom_op(
    "tokenzoo::selective_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, bool softplus, bool keep, str kernel) -> ({_OUTPUTS})",
)
def scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, D, L], last state [B, D, N] and the states kept for the gradient."""
    *inputs, softplus, keep, kernel = args
    with without_autocast(inputs[0]):
        return _kernel(kernel)[0](ScanCall(*inputs, softplus), keep)


@torch.library.custom_op(
    "tokenzoo::selective_scan_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor kept, Tensor? grad_out, Tensor? grad_last, bool softplus, str kernel) -> ({_GRADIENTS})",  # noqa: E501
)
def scan_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of the ten inputs; empty where an input is absent."""
    *inputs, kept, grad_out, grad_last, softplus, kernel = args
    with without_autocast(inputs[0]):
        return _kernel(kernel)[1](ScanCall(*inputs, softplus), kept, grad_out, grad_last)


def _kernel(name: str) -> tuple[Any, Any]:
    if name == "triton":
        from . import triton_scan as scan_triton

        return scan_triton.forward, scan_triton.backward
    return scan_blocked.forward, scan_blocked_backward.backward


@scan.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, _, A, B, *_, keep, kernel = args
    batch, dim, length = u.shape
    work, states, groups = compute_dtype(u), A.shape[1], B.shape[1]
    panels = (length + PANEL - 1) // PANEL if keep else 0
    return (
        u.new_empty((batch, length, dim)).transpose(1, 2),
        u.new_empty((batch, dim, states), dtype=work),
        u.new_empty((panels, batch, groups, states, dim // groups), dtype=work),
    )


@scan_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, kept = args[:_COUNT], args[_COUNT]

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return kept.new_empty(0)
        if x.dim() == 3 and x.shape == inputs[0].shape:
            return x.new_empty((x.shape[0], x.shape[2], x.shape[1])).transpose(1, 2)
        return x.new_empty(x.shape)

    *grads, state = inputs
    return *(like(x) for x in grads), kept.new_empty(0) if state is None else state.new_empty(state.shape)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, _, ctx.kernel = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple:
    *tensors, kept = ctx.saved_tensors
    grads = scan_backward(*tensors, kept, grad_out, grad_last, ctx.softplus, ctx.kernel)
    return *(None if x is None else g for x, g in zip(tensors, grads)), None, None, None


scan.register_autograd(_backward, setup_context=_setup)
