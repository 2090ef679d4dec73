"""Gradients of the blocked selective scan: states again from the kept ones, then the same recurrence backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .call import ScanCall, from_state, rates_of, to_state
from .tiles import PANEL, Panel, Tile, base2, decays, panel, read, tiles


@dataclass
class Gradients:
    """Gradients of every argument; None where the argument is absent."""

    u: Tensor  # [B, L, D], as delta, z and decay
    delta: Tensor
    z: Tensor | None
    decay: Tensor | None
    A: Tensor  # [G, N, D / G]
    B: Tensor  # [B, L, G, N], as C
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    state: Tensor  # [B, G, N, D / G]


@torch.no_grad()
def backward(call: ScanCall, kept: Tensor, grad_out: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, bias, decay and state, in this order; empty where an argument is absent.

    Args:
        call: The arguments.
        kept: States that the forward pass kept, [K, B, G, N, D / G].
        grad_out: [B, D, L], or None for zeros.
        grad_last: [B, D, N], or None for zeros.
    """
    batch, dim, length = call.u.shape
    rates = rates_of(call)
    start = torch.zeros_like(kept[0]) if grad_last is None else to_state(grad_last.to(kept.dtype), call.B.shape[1])
    small = (batch, length, call.B.shape[1], rates.shape[1])

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty((batch, length, dim), dtype=x.dtype, device=x.device)

    grads = Gradients(
        like(call.u), like(call.delta), like(call.z), like(call.decay),
        torch.zeros_like(rates), kept.new_zeros(small), kept.new_zeros(small),
        None if call.D is None else kept.new_zeros(dim),
        None if call.bias is None else kept.new_zeros(dim),
        start.clone(memory_format=torch.contiguous_format),
    )  # fmt: skip
    if grad_out is None:
        grad_out = torch.zeros((1,), dtype=call.u.dtype, device=call.u.device).expand(call.u.shape)
    for tile in tiles(call, share=2):
        _walk_tile(call, tile, rates, kept, grad_out, grads)

    def turned(x: Tensor | None) -> Tensor:
        return kept.new_empty(0) if x is None else x.transpose(1, 2)

    def cast(x: Tensor | None, like: Tensor | None) -> Tensor:
        return kept.new_empty(0) if x is None or like is None else x.to(like.dtype)

    # B and C contiguous: torch 2.6 compiles a stack of permuted gradients to wrong numbers
    return (
        turned(grads.u), turned(grads.delta), cast(from_state(grads.A[None])[0], call.A),
        cast(grads.B.permute(0, 2, 3, 1).contiguous(), call.B), cast(grads.C.permute(0, 2, 3, 1).contiguous(), call.C),
        cast(grads.D, call.D), turned(grads.z), cast(grads.bias, call.bias), turned(grads.decay),
        cast(from_state(grads.state), call.state),
    )  # fmt: skip


def _walk_tile(call: ScanCall, tile: Tile, rates: Tensor, kept: Tensor, grad_out: Tensor, grads: Gradients) -> None:
    """Adds the gradients of a tile, panel by panel from the last to the first."""
    length, states = call.u.shape[2], rates.shape[1]
    rows, groups, width = tile.shape
    rates = rates[tile.groups, :, tile.inner].contiguous()
    binary = base2(rates)
    place = grads.state[tile.rows, tile.groups, :, tile.inner]
    carry = place.contiguous()  # a_{t+1} g_{t+1}
    a, g, h = (carry.new_empty((PANEL + 1, rows, groups, states, width)) for _ in range(3))
    steps = a.unbind(), g.unbind(), h.unbind()
    room = carry.new_empty((6, PANEL, rows, groups * width))
    for number in reversed(range(len(kept))):
        start = number * PANEL
        stop = min(start + PANEL, length)
        *used, y, dy, spare = room[:, : stop - start]
        p = panel(call, tile, start, stop, used)
        span = (tile.rows, slice(start, stop), tile.channels)
        h[0] = kept[number, tile.rows, tile.groups, :, tile.inner]
        _states(p, binary, a, h, steps)
        dy.copy_(read(grad_out, tile, start, stop))
        if call.z is not None:
            _through_gate(call, tile, p, h[1 : len(dy) + 1], read(call.z, tile, start, stop), (y, dy, spare))
            _write(grads.z, span, y)
        _adjoints(p, dy, a, g, carry, steps)
        _sum_parameters(tile, p, dy, (a, g, h), (start, stop), grads)
        _sum_streams(call, tile, span, p, rates, (a, g, h), (y, dy, spare), grads)
    place.copy_(carry)


def _states(p: Panel, binary: Tensor, a: Tensor, h: Tensor, steps: tuple) -> None:
    """Fills decays a and states h; h[0], the state before the first step, is given."""
    count, shape = len(p.u), (a.shape[2], 1, a.shape[4])
    decays(p.decay.unflatten(2, shape), binary, a[:count])
    torch.mul(p.drive.unflatten(2, shape), p.B.unsqueeze(-1), out=h[1 : count + 1])
    a_steps, _, h_steps = steps
    for t in range(count):
        torch.addcmul(h_steps[t + 1], a_steps[t], h_steps[t], out=h_steps[t + 1])


def _through_gate(call: ScanCall, tile: Tile, p: Panel, after: Tensor, z: Tensor, room: tuple) -> None:
    """Turns dy into the gradient of the output before the gate, and y into that of the gate's argument."""
    y, dy, gate = room
    _into(p.C, after, y)
    if call.D is not None:
        y.addcmul_(p.u, call.D[tile.channels].to(y.dtype))
    y.mul_(dy)
    z = z.to(y.dtype)
    torch.sigmoid(z, out=gate)
    dy.mul_(z).mul_(gate)
    gate.addcmul_(z * gate, 1 - gate)  # derivative of z sigmoid(z)
    y.mul_(gate)


def _adjoints(p: Panel, dy: Tensor, a: Tensor, g: Tensor, carry: Tensor, steps: tuple) -> None:
    """Fills g_t = C_t dy_t + a_{t+1} g_{t+1}, turns a into a g and moves the carry to the panel before."""
    count = len(dy)
    torch.mul(dy.unflatten(2, (g.shape[2], 1, g.shape[4])), p.C.unsqueeze(-1), out=g[:count])
    a_steps, g_steps, _ = steps
    g_steps[count - 1].add_(carry)
    for t in reversed(range(count - 1)):
        torch.addcmul(g_steps[t], a_steps[t + 1], g_steps[t + 1], out=g_steps[t])
    a[:count].mul_(g[:count])
    carry.copy_(a[0])


def _sum_parameters(tile: Tile, p: Panel, dy: Tensor, buffers: tuple, span: tuple, grads: Gradients) -> None:
    """Adds to the gradients of B and C, sums over channels."""
    _, g, h = buffers
    count, states, width = len(dy), *g.shape[-2:]
    for into, weights, x in ((grads.C, dy, h[1 : count + 1]), (grads.B, p.drive, g[:count])):
        found = torch.bmm(weights.view(-1, 1, width), x.view(-1, states, width).transpose(1, 2))
        into[tile.rows, slice(*span), tile.groups] += found.view(p.B.shape).transpose(0, 1)


def _sum_streams(
    call: ScanCall, tile: Tile, span: tuple, p: Panel, rates: Tensor, buffers: tuple, room: tuple, grads: Gradients
) -> None:
    """Writes the gradients of u, delta and decay and adds to those of A, D and bias; uses up what it is given."""
    (to_drive, dy, to_decay), (ag, g, h) = room, (x[: len(p.u)] for x in buffers)
    shape, channels = (g.shape[2], g.shape[4]), tile.channels
    _into(p.B, g, to_drive)
    ag.mul_(h)  # a_t g_t h_{t-1}
    torch.sum(torch.mul(ag, rates, out=g), 3, out=to_decay.unflatten(2, shape))
    ag.mul_(p.decay.unflatten(2, shape).unsqueeze(3))
    grads.A[tile.groups, :, tile.inner] += ag.sum((0, 1))

    to_u = p.dt.mul_(to_drive)
    if call.D is not None:
        to_u.addcmul_(dy, call.D[channels].to(dy.dtype))
        grads.D[channels] += dy.mul_(p.u).sum((0, 1))
    _write(grads.u, span, to_u)
    to_raw = to_drive.mul_(p.u)
    if call.decay is None:
        to_raw.add_(to_decay)
    else:
        _write(grads.decay, span, to_decay)
    if call.softplus:
        to_raw.mul_(p.raw.sigmoid_())
    if call.bias is not None:
        grads.bias[channels] += to_raw.sum((0, 1))
    _write(grads.delta, span, to_raw)


def _into(weights: Tensor, x: Tensor, out: Tensor) -> None:
    """Sums over the states, weights [T, R, G, N] and x [T, R, G, N, D] to out [T, R, G D]."""
    states, width = x.shape[-2:]
    torch.bmm(weights.view(-1, 1, states), x.view(-1, states, width), out=out.view(-1, 1, width))


def _write(into: Tensor, span: tuple, x: Tensor) -> None:
    into[span] = x.transpose(0, 1)
