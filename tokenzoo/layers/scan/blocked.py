"""Selective scan in blocks of steps: the decays of a block at once, then one fused multiply-add a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import ScanCall, first_state, from_state, rates_of
from .tiles import BLOCK, PANEL, Tile, base2, decays, panel, read, tiles


@torch.no_grad()
def forward(call: ScanCall, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the scan.

    Args:
        call: The arguments.
        keep: Whether states for the backward pass are asked for.

    Returns:
        Output [B, D, L] in the dtype of u, channels last in memory; last state [B, D, N]; states before every PANEL
        steps [K, B, G, N, D / G], or an empty tensor.
    """
    batch, dim, length = call.u.shape
    out = torch.empty((batch, length, dim), dtype=call.u.dtype, device=call.u.device)
    carry, rates = first_state(call), base2(rates_of(call))
    kept = carry.new_empty((-(-length // PANEL) if keep else 0, *carry.shape))
    for tile in tiles(call):
        _scan_tile(call, tile, rates, carry, kept, out)
    return out.transpose(1, 2), from_state(carry), kept


def _scan_tile(call: ScanCall, tile: Tile, rates: Tensor, carry: Tensor, kept: Tensor, out: Tensor) -> None:
    """Scans a tile from its state in `carry`, which becomes its last state."""
    length, states = call.u.shape[2], rates.shape[1]
    rows, groups, width = tile.shape
    rates = rates[tile.groups, :, tile.inner].contiguous()
    state = carry[tile.rows, tile.groups, :, tile.inner]
    held = state.contiguous()
    a = held.new_empty((BLOCK, rows, groups, states, width))
    h = torch.empty_like(a)
    room = held.new_empty((4, PANEL, rows, groups * width))
    a_steps, h_steps = a.unbind(), h.unbind()  # views made once: a view costs as much as a step
    for number, start in enumerate(range(0, length, PANEL)):
        stop = min(start + PANEL, length)
        if len(kept):
            kept[number, tile.rows, tile.groups, :, tile.inner] = held
        *used, y = room[:, : stop - start]
        p = panel(call, tile, start, stop, used)
        steps, drive = (x.unflatten(2, (groups, 1, width)) for x in (p.decay, p.drive))
        flat = y.view(-1, 1, width)
        for first in range(0, stop - start, BLOCK):
            span = slice(first, min(first + BLOCK, stop - start))
            count = span.stop - first
            decays(steps[span], rates, a[:count])
            torch.mul(drive[span], p.B[span].unsqueeze(-1), out=h[:count])
            before = held
            for t in range(count):
                torch.addcmul(h_steps[t], a_steps[t], before, out=h_steps[t])
                before = h_steps[t]
            held.copy_(before)
            of_span = slice(first * rows * groups, span.stop * rows * groups)
            torch.bmm(p.C[span].view(-1, 1, states), h[:count].view(-1, states, width), out=flat[of_span])
        if call.D is not None:
            y.addcmul_(p.u, call.D[tile.channels].to(y.dtype))
        if call.z is not None:
            z = read(call.z, tile, start, stop).to(y.dtype)
            y.mul_(z).mul_(torch.sigmoid(z, out=p.raw))
        out[tile.rows, start:stop, tile.channels] = y.transpose(0, 1)
    state.copy_(held)
