"""The mixer of Vision Mamba: a selective scan over the tokens, forward and backward.

Parameters are named as in the released weights.

Source: Zhu, Liao, Zhang, Wang, Liu, Wang, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model", ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.scan.selective_scan import selective_scan
from ...ops.projections import cast_for, is_plain, product_and_bias
from .._scan_signals import ScanSignals

Stretch = Callable[[Tensor, str, Tensor], Tensor]

_DIRECTIONS = {"none": ("forward",), "v1": ("forward", "backward"), "v2": ("forward", "backward")}
_DT_RANGE, _DT_FLOOR = (1e-3, 0.1), 1e-4


class _Drive(NamedTuple):
    """What drives the scan of one direction, in scan order. Channels are last in memory, as the scan likes it."""

    u: Tensor  # [B, L, D]
    raw_delta: Tensor  # [B, L, D], before bias and softplus
    B: Tensor  # [B, L, N]
    C: Tensor  # [B, L, N]
    bias: Tensor  # [D], of the step sizes


class VimMixer(nn.Module):
    """Bidirectional Mamba mixer; both directions run in one scan.

    Args:
        dim: channels C of the tokens.
        d_state: states N a channel.
        d_conv: positions that the causal convolution sees.
        expand: inner channels D over `dim`.
        dt_rank: channels that step sizes are projected from; None for a sixteenth of `dim`.
        bimamba_type: "v2" has own parameters for each direction, "v1" only own decays, "none" scans forward alone.
        if_divide_out: take the mean of the directions of "v2" instead of their sum.
        scan_backend: see `tokenzoo.layers.scan.selective_scan`; None chooses.

    Raises:
        ValueError: an unknown `bimamba_type`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bimamba_type: str = "v2",
        if_divide_out: bool = True,
        scan_backend: str | None = None,
    ):
        super().__init__()
        if bimamba_type not in _DIRECTIONS:
            raise ValueError(f"VimMixer: bimamba_type={bimamba_type!r}; choose one of {', '.join(_DIRECTIONS)}")
        self.dim = dim
        self.d_state = d_state
        self.d_inner = expand * dim
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.bimamba_type = bimamba_type
        self.if_divide_out = if_divide_out
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(dim, 2 * self.d_inner, bias=False)
        suffixes = ("", "_b") if bimamba_type == "v2" else ("",)
        for suffix in suffixes:
            conv = nn.Conv1d(self.d_inner, self.d_inner, d_conv, padding=d_conv - 1, groups=self.d_inner)
            setattr(self, f"conv1d{suffix}", conv)
            setattr(self, f"x_proj{suffix}", nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{suffix}", nn.Linear(self.dt_rank, self.d_inner))
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(self.d_inner)))
        for name in ("A_log", "A_b_log")[: self.directions]:
            rates = torch.arange(1, d_state + 1, dtype=torch.float32).log()
            setattr(self, name, nn.Parameter(rates.repeat(self.d_inner, 1)))
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False)
        self._init_steps()

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            "VimMixer cannot be compiled by torch.jit.script: its scan is an operator of its own that chooses among "
            "kernels while it runs; use torch.jit.trace, torch.compile or torch.export instead"
        )

    @property
    def directions(self) -> int:
        """How many scans run over the tokens."""
        return len(_DIRECTIONS[self.bimamba_type])

    @torch.no_grad()
    def _init_steps(self) -> None:
        """First step sizes log-uniform in a range; those of the backward direction start without it, as published."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = map(math.log, _DT_RANGE)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp().clamp_(min=_DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        if self.bimamba_type == "v2":
            nn.init.zeros_(self.dt_proj_b.bias)

    def _drive(self, x: Tensor, conv: nn.Module, x_proj: nn.Module, dt_proj: nn.Module) -> _Drive:
        u = F.silu(_causal_conv(x, conv))
        steps, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        raw, bias = product_and_bias(dt_proj, steps)  # the bias is added in float32, by the scan
        return _Drive(u, raw, B, C, bias)

    def _drives(self, x: Tensor) -> tuple[_Drive, ...]:
        forward = self._drive(x, self.conv1d, self.x_proj, self.dt_proj)
        if self.bimamba_type == "none":
            return (forward,)
        if self.bimamba_type == "v1":
            return forward, _Drive(*(part.flip(1) for part in forward[:4]), forward.bias)
        return forward, self._drive(x.flip(1), self.conv1d_b, self.x_proj_b, self.dt_proj_b)

    def _parameters_of_scan(self) -> tuple[list[Tensor], list[Tensor]]:
        """Decays A [D, N] and skips [D], a direction each."""
        logs = [self.A_log] if self.directions == 1 else [self.A_log, self.A_b_log]
        decays = [-torch.exp(_wide(log)) for log in logs]
        if self.bimamba_type == "v2":
            return decays, [self.D, self.D_b]
        return decays, [self.D] * self.directions

    def forward(self, y: Tensor, stretch: Stretch | None = None, signals: ScanSignals | None = None) -> Tensor:
        """Mixes tokens.

        Args:
            y: normed tokens [B, L, C].
            stretch: a function of step sizes in scan order [B, D, L], "forward" or "backward" and the step size of a
                token of zeros [D], giving the step sizes that states decay with [B, D, L]; None for the step sizes
                themselves.
            signals: None, or what to fill.

        Returns:
            Mixed tokens [B, L, C], to be added to the stream.
        """
        x, z = self.in_proj(cast_for(self.in_proj, y)).chunk(2, dim=-1)  # [B, L, D] each
        drives = self._drives(x)
        decays, skips = self._parameters_of_scan()
        biases = [drive.bias for drive in drives]
        raw_delta = torch.cat([drive.raw_delta for drive in drives], dim=-1).transpose(1, 2)
        bias = torch.cat(biases)
        deltas: tuple[Tensor, ...] = ()
        if stretch is not None or signals is not None:
            deltas = F.softplus(_wide(raw_delta) + _wide(bias)[:, None]).chunk(self.directions, dim=1)
        decay_dt = None
        if stretch is not None:
            names = _DIRECTIONS[self.bimamba_type]
            of_zero = [F.softplus(_wide(each)) for each in biases]
            decay_dt = torch.cat([stretch(*each) for each in zip(deltas, names, of_zero)], dim=1)
        out = selective_scan(
            torch.cat([drive.u for drive in drives], dim=-1).transpose(1, 2),
            raw_delta,
            torch.cat(decays),
            torch.stack([drive.B for drive in drives], dim=1).transpose(2, 3),
            torch.stack([drive.C for drive in drives], dim=1).transpose(2, 3),
            torch.cat(skips),
            delta_bias=bias,
            delta_softplus=True,
            decay_dt=decay_dt,
            backend=self.scan_backend,
        )
        outs = _in_token_order(out.chunk(self.directions, dim=1))
        gate = F.silu(z).transpose(1, 2)
        if signals is not None:
            signals.delta = _in_token_order(deltas)
            signals.raw_delta = _in_token_order(drive.raw_delta.transpose(1, 2) for drive in drives)
            signals.B = _in_token_order(drive.B.transpose(1, 2) for drive in drives)
            signals.C = _in_token_order(drive.C.transpose(1, 2) for drive in drives)
            signals.y, signals.gate = outs, gate
        mixed = outs[0] if self.directions == 1 else outs[0] + outs[1]
        # both directions have the same gate, so it can wait for their sum, and so can the half of the mean
        mixed = self.out_proj((mixed * gate).transpose(1, 2))
        return mixed / 2 if self.bimamba_type == "v2" and self.if_divide_out else mixed


def _causal_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """Depthwise convolution [B, L, D] of x [B, L, D] that sees only the past.

    `tokenzoo.layers.causal_conv1d` takes channels first in memory. Tokens seen as maps of one row, channels last, need
    no transposition, and depthwise kernels for that layout are several times as fast on a CPU.
    """
    if not is_plain(conv, nn.Conv1d):
        return conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
    maps = x.transpose(1, 2).unsqueeze(2).contiguous(memory_format=torch.channels_last)  # [B, D, 1, L]
    maps = F.conv2d(maps, conv.weight.unsqueeze(2), conv.bias, padding=(0, conv.padding[0]), groups=conv.groups)
    return maps[..., : x.shape[1]].squeeze(2).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """At least float32: what an exponential or softplus of the scan is taken of."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _in_token_order(parts) -> tuple[Tensor, ...]:
    return tuple(part.flip(-1) if index else part for index, part in enumerate(parts))
