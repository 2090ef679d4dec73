"""Triton kernels of the selective scan; imported only where they are launched.

A program takes one row of the batch and CHANNELS channels of one group through all steps, the state in registers. The
backward kernel walks the panels from the last to the first: it runs a panel again from its kept state, parks the states
in a scratch buffer that stays in the cache, and then runs the recurrence of the gradients backwards over them. B and C
get one partial gradient a program, added up afterwards: no atomics, so results do not change from run to run.
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))  # log1p(e) to the last digit
    return tl.where(x > 20.0, x, small)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def _steps(delta, at, mask, bias, decay, HAS_DECAY: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Step before softplus, step, and step that decays the state, of one time."""
    raw = tl.load(delta + at, mask=mask, other=0.0).to(bias.dtype) + bias
    dt = _softplus(raw) if SOFTPLUS else raw
    w = dt
    if HAS_DECAY:
        w = tl.load(decay + at, mask=mask, other=0.0).to(bias.dtype)
    return raw, dt, w


@triton.jit
def forward_kernel(
    u, delta, decay, z, A, Bm, Cm, skip, bias, first, out, last, kept,
    dim, length, states, groups,
    HAS_DECAY: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, PANEL: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Streams are [B, L, D]; A [D, N]; Bm, Cm [B, L, G, N]; states [B, D, N]; kept [K, B, D, N]."""
    row, width = tl.program_id(1), dim // groups
    blocks = tl.cdiv(width, CHANNELS)
    group = tl.program_id(0) // blocks
    inner = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    mask = inner < width
    d = group * width + inner
    n = tl.arange(0, STATES)
    n_mask = n < states
    both = mask[:, None] & n_mask[None, :]
    of_state = d[:, None] * states + n[None, :]
    here = row.to(tl.int64) * dim * states + of_state

    rates = tl.load(A + of_state, mask=both, other=0.0)
    h = tl.load(first + here, mask=both, other=0.0)
    b = tl.zeros([CHANNELS], dtype=rates.dtype)
    s = tl.zeros([CHANNELS], dtype=rates.dtype)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=mask, other=0.0)
    if HAS_SKIP:
        s = tl.load(skip + d, mask=mask, other=0.0)
    for t in range(0, length):
        time = row.to(tl.int64) * length + t
        if KEEP:
            if t % PANEL == 0:
                tl.store(kept + ((t // PANEL) * tl.num_programs(1)).to(tl.int64) * dim * states + here, h, mask=both)
        at = time * dim + d
        x = tl.load(u + at, mask=mask, other=0.0).to(rates.dtype)
        raw, dt, w = _steps(delta, at, mask, b, decay, HAS_DECAY, SOFTPLUS)
        in_time = (time * groups + group) * states + n
        bt = tl.load(Bm + in_time, mask=n_mask, other=0.0).to(rates.dtype)
        ct = tl.load(Cm + in_time, mask=n_mask, other=0.0).to(rates.dtype)
        h = tl.exp(w[:, None] * rates) * h + (dt * x)[:, None] * bt[None, :]
        y = tl.sum(h * ct[None, :], axis=1) + s * x
        if HAS_GATE:
            gate = tl.load(z + at, mask=mask, other=0.0).to(rates.dtype)
            y = y * gate * _sigmoid(gate)
        tl.store(out + at, y, mask=mask)
    tl.store(last + here, h, mask=both)


@triton.jit
def backward_kernel(
    u, delta, decay, z, A, Bm, Cm, skip, bias, kept, grad_out, grad_last,
    to_u, to_delta, to_decay, to_z, to_a, to_b, to_c, to_skip, to_bias, to_first, scratch,
    dim, length, states, groups,
    HAS_DECAY: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, PANEL: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients: streams as in the forward kernel; to_a [B, D, N], to_b and to_c [B, L, programs, N], others [B, D]."""
    row, width = tl.program_id(1), dim // groups
    blocks = tl.cdiv(width, CHANNELS)
    group = tl.program_id(0) // blocks
    inner = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    mask = inner < width
    d = group * width + inner
    n = tl.arange(0, STATES)
    n_mask = n < states
    both = mask[:, None] & n_mask[None, :]
    of_state = d[:, None] * states + n[None, :]
    here = row.to(tl.int64) * dim * states + of_state
    program = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    parked = scratch + program * PANEL * CHANNELS * STATES + (tl.arange(0, CHANNELS)[:, None] * STATES + n[None, :])

    rates = tl.load(A + of_state, mask=both, other=0.0)
    carry = tl.load(grad_last + here, mask=both, other=0.0)  # a_{t+1} g_{t+1}
    b = tl.zeros([CHANNELS], dtype=rates.dtype)
    s = tl.zeros([CHANNELS], dtype=rates.dtype)
    sum_bias = tl.zeros([CHANNELS], dtype=rates.dtype)
    sum_skip = tl.zeros([CHANNELS], dtype=rates.dtype)
    sum_a = tl.zeros([CHANNELS, STATES], dtype=rates.dtype)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=mask, other=0.0)
    if HAS_SKIP:
        s = tl.load(skip + d, mask=mask, other=0.0)
    panels = tl.cdiv(length, PANEL)
    for done in range(0, panels):
        panel = panels - 1 - done
        start = panel * PANEL
        count = tl.minimum(PANEL, length - start)
        h = tl.load(kept + (panel * tl.num_programs(1)).to(tl.int64) * dim * states + here, mask=both, other=0.0)
        for i in range(0, count):
            time = row.to(tl.int64) * length + start + i
            tl.store(parked + i * CHANNELS * STATES, h)
            at = time * dim + d
            x = tl.load(u + at, mask=mask, other=0.0).to(rates.dtype)
            raw, dt, w = _steps(delta, at, mask, b, decay, HAS_DECAY, SOFTPLUS)
            bt = tl.load(Bm + (time * groups + group) * states + n, mask=n_mask, other=0.0).to(rates.dtype)
            h = tl.exp(w[:, None] * rates) * h + (dt * x)[:, None] * bt[None, :]
        tl.debug_barrier()
        for back in range(0, count):
            i = count - 1 - back
            time = row.to(tl.int64) * length + start + i
            before = tl.load(parked + i * CHANNELS * STATES)
            at = time * dim + d
            x = tl.load(u + at, mask=mask, other=0.0).to(rates.dtype)
            raw, dt, w = _steps(delta, at, mask, b, decay, HAS_DECAY, SOFTPLUS)
            in_time = (time * groups + group) * states + n
            bt = tl.load(Bm + in_time, mask=n_mask, other=0.0).to(rates.dtype)
            ct = tl.load(Cm + in_time, mask=n_mask, other=0.0).to(rates.dtype)
            dy = tl.load(grad_out + at, mask=mask, other=0.0).to(rates.dtype)
            a = tl.exp(w[:, None] * rates)
            h = a * before + (dt * x)[:, None] * bt[None, :]
            if HAS_GATE:
                gate = tl.load(z + at, mask=mask, other=0.0).to(rates.dtype)
                open = _sigmoid(gate)
                y = tl.sum(h * ct[None, :], axis=1) + s * x
                tl.store(to_z + at, dy * y * open * (1.0 + gate * (1.0 - open)), mask=mask)
                dy = dy * gate * open
            g = dy[:, None] * ct[None, :] + carry
            part = (time * tl.num_programs(0) + tl.program_id(0)) * states + n
            tl.store(to_c + part, tl.sum(dy[:, None] * h, axis=0), mask=n_mask)
            tl.store(to_b + part, tl.sum((dt * x)[:, None] * g, axis=0), mask=n_mask)
            drive = tl.sum(g * bt[None, :], axis=1)
            carry = a * g
            through = carry * before
            of_decay = tl.sum(through * rates, axis=1)
            sum_a += through * w[:, None]
            of_raw = drive * x
            if HAS_DECAY:
                tl.store(to_decay + at, of_decay, mask=mask)
            else:
                of_raw += of_decay
            if SOFTPLUS:
                of_raw *= _sigmoid(raw)
            sum_bias += of_raw
            sum_skip += dy * x
            tl.store(to_delta + at, of_raw, mask=mask)
            tl.store(to_u + at, drive * dt + s * dy, mask=mask)
        tl.debug_barrier()
    tl.store(to_a + here, sum_a, mask=both)
    tl.store(to_first + here, carry, mask=both)
    tl.store(to_bias + row * dim + d, sum_bias, mask=mask)
    tl.store(to_skip + row * dim + d, sum_skip, mask=mask)
