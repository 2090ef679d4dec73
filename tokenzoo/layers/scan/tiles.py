"""How the selective scan is cut into pieces that stay in the cache, and what is computed of each piece first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .call import ScanCall

PANEL = 32  # steps between two states that the backward pass starts from: N / PANEL of the inputs' memory
BLOCK = 8  # steps whose decays are computed at once in the forward pass
_STATES = 49152  # numbers of a tile's state: large enough to outweigh the cost of a call, small enough for the cache
_LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Rows of the batch and channels that are scanned together: whole groups, or a part of one group."""

    rows: slice
    channels: slice
    groups: slice
    inner: slice  # channels within their group

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, groups and channels a group."""
        return (
            self.rows.stop - self.rows.start,
            self.groups.stop - self.groups.start,
            self.inner.stop - self.inner.start,
        )


class Panel(NamedTuple):
    """What a tile needs of PANEL steps, in the type the scan computes in, time first."""

    u: Tensor  # [T, R, D], as raw, dt, decay and drive
    raw: Tensor  # delta + bias
    dt: Tensor
    decay: Tensor
    drive: Tensor  # dt u
    B: Tensor  # [T, R, G, N], contiguous, as C
    C: Tensor


def tiles(call: ScanCall, share: int = 1) -> Iterator[Tile]:
    """Cuts batch and channels so that a tile's state holds about the wanted number of numbers.

    Args:
        call: The scan.
        share: Divides that number, for passes that hold more of it at a time.
    """
    batch, dim, _ = call.u.shape
    per_group, states = dim // call.B.shape[1], call.A.shape[1]
    threads = torch.get_num_threads() if call.u.device.type == "cpu" else 1
    budget = max(_STATES * threads // share // states, 16)  # channels, over rows and groups
    width = min(per_group, budget)  # channels of one group
    groups = min(call.B.shape[1], max(1, budget // per_group))
    rows = max(1, min(batch, budget // (width * groups)))
    for row in range(0, batch, rows):
        for group in range(0, call.B.shape[1], groups):
            last = min(group + groups, call.B.shape[1])
            for start in range(0, per_group, width):
                stop = min(start + width, per_group)
                channels = slice(group * per_group + start, (last - 1) * per_group + stop)
                yield Tile(slice(row, min(row + rows, batch)), channels, slice(group, last), slice(start, stop))


def panel(call: ScanCall, tile: Tile, start: int, stop: int, room: Tensor) -> Panel:
    """Computes the pointwise part of some steps.

    Args:
        call: The scan.
        tile: Its part.
        start: First step.
        stop: Step after the last.
        room: Memory for three results, [3, T, R, D]: fresh memory would cost more than the arithmetic.
    """
    raw, dt, drive = room
    u, delta = (read(x, tile, start, stop).to(raw.dtype) for x in (call.u, call.delta))
    raw.copy_(delta) if call.bias is None else torch.add(delta, call.bias[tile.channels].to(raw.dtype), out=raw)
    softplus(raw, dt, drive) if call.softplus else dt.copy_(raw)
    decay = dt if call.decay is None else read(call.decay, tile, start, stop).to(raw.dtype)
    parameters = [
        x[tile.rows, tile.groups, :, start:stop].permute(3, 0, 1, 2).to(raw.dtype).contiguous()
        for x in (call.B, call.C)
    ]
    return Panel(u, raw, dt, decay, torch.mul(dt, u, out=drive), *parameters)


def softplus(x: Tensor, out: Tensor, room: Tensor) -> None:
    """Writes log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)) into `out`, with the faster exp2; `room` is overwritten."""
    torch.abs(x, out=out)
    out.mul_(-_LOG2E).exp2_().log1p_().add_(torch.clamp(x, min=0, out=room))


def read(x: Tensor, tile: Tile, start: int, stop: int) -> Tensor:
    """A tile's steps of a [B, D, L] tensor, time first, channels last in memory: [T, R, D]."""
    x = x[tile.rows, tile.channels, start:stop].permute(2, 0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


def decays(steps: Tensor, rates: Tensor, out: Tensor) -> None:
    """Writes exp(dt A), [T, R, G, N, D], of steps [T, R, G, 1, D] and A in base 2: exp2 is the faster one on a CPU."""
    torch.mul(steps, rates, out=out)
    out.exp2_()


def base2(rates: Tensor) -> Tensor:
    """Rates for `decays`."""
    return rates * _LOG2E
