"""The mixer of PlainMamba: one set of parameters scans the grid of tokens along four continuous paths.

Two habits of the released code are kept, as every checkpoint depends on them. Only the scanned values are reordered:
step t of every path takes the step size, B and C of raster token t, not those of the token that it visits. And the
bias of the step size is added twice, in the projection and again in the scan.

Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ...layers.scan.selective_scan import selective_scan
from ...ops.projections import product_and_bias
from ...ops.rows import take_rows
from .._scan_signals import ScanSignals
from .orders import DIRECTIONS, PATHS, KeptPaths, ScanPaths, kept_paths, scan_paths

Stretch = Callable[[Tensor, int, Tensor], Tensor]

_DT_RANGE = 1e-3, 0.1  # step sizes at the start of training


class PlainMambaMixer(nn.Module):
    """Selective scan of a grid of tokens along four paths, whose outputs are added.

    Args:
        dim: channels C.
        d_state: channels N of the state.
        expand: inner channels D over C.
        conv_size: side of the depthwise convolution, odd.
        dt_rank: channels that step sizes are projected from; None for C / 16, rounded up.
        conv_bias: bias of the convolution.
        bias: bias of the first and the last projection.
        scan_backend: see `tokenzoo.layers.scan.selective_scan`; None chooses.

    Raises:
        ValueError: an even `conv_size`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        expand: int = 2,
        conv_size: int = 7,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = True,
        scan_backend: str | None = None,
    ):
        super().__init__()
        if conv_size % 2 == 0:
            raise ValueError(f"PlainMambaMixer: conv_size={conv_size} has no centre; give an odd size")
        self.dim, self.d_state, self.scan_backend = dim, d_state, scan_backend
        self.d_inner = expand * dim
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * self.d_inner, bias=bias)
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, conv_size, padding=conv_size // 2, groups=self.d_inner, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.direction_Bs = nn.Parameter(torch.empty(DIRECTIONS, d_state))
        self.out_proj = nn.Linear(self.d_inner, dim, bias=bias)
        self.reset_parameters()

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            "PlainMambaMixer cannot be compiled by torch.jit.script: its scan is an operator of its own that chooses "
            "among kernels while it runs; use torch.jit.trace, torch.compile or torch.export instead"
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start; the convolution keeps PyTorch's."""
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.D).uniform_(*map(math.log, _DT_RANGE)).exp_()
        self.dt_proj.bias.copy_(dt + (-torch.expm1(-dt)).log())  # softplus backwards
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=dt.device).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        trunc_normal_(self.direction_Bs, std=0.02)

    def forward(
        self,
        y: Tensor,
        grid: tuple[int, int],
        kept: Tensor | None = None,
        stretch: Stretch | None = None,
        signals: ScanSignals | None = None,
    ) -> Tensor:
        """Mixes the tokens of a grid, or those that are left of it.

        After pruning, the convolution sees zeros where tokens are missing, and every path is the original one cut
        down to the kept tokens: step j takes the step size, B and C of the j-th kept token in raster order, and the
        values and the direction of arrival of the j-th kept token on the path.

        Args:
            y: normed tokens in raster order [B, K, C].
            grid: tokens (high, wide) of the whole image.
            kept: raster positions of the tokens [B, K] int64, ascending; None where all are there.
            stretch: called a path with the step sizes [B, D, K] float32 as its steps take them, the path's number and
                the step size [D] of a token of zeros; returns the step sizes that the state decays by. None for the
                step sizes themselves.
            signals: filled with step sizes, B, C and outputs a path, and the gate. What is indexed by step in the scan
                stands in raster order, since steps take the tokens in that order; so do the outputs.

        Returns:
            [B, K, C].

        Raises:
            ValueError: tokens, `kept` and `grid` do not match.
        """
        _check(y, grid, kept)
        x, z = self.in_proj(y).chunk(2, dim=-1)
        x = F.silu(on_grid(self.conv2d, x, grid, kept))
        low, b, c = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        raw, bias = product_and_bias(self.dt_proj, low)  # [B, K, D], [D]
        bias = 2 * _wide(bias)  # as released; in float32, whatever the projection computes in
        dt = F.softplus(_wide(raw) + bias).transpose(1, 2)  # once for all paths, not inside their scan
        paths = scan_paths(grid, y.device) if kept is None else kept_paths(grid, kept)
        b = (b.unsqueeze(1) + self.direction_Bs[paths.direction]).transpose(2, 3)  # [B, 4, N, K]
        c = c.transpose(1, 2)
        decay = None
        if stretch is not None:
            of_zero = F.softplus(bias)
            decay = torch.stack([stretch(dt, path, of_zero) for path in range(PATHS)], dim=1).flatten(0, 1)
        scanned = self._scan(x, dt, b, c, decay, paths)
        gate = F.silu(z)
        if signals is not None:
            signals.delta, signals.raw_delta = (dt,) * PATHS, (raw.transpose(1, 2),) * PATHS
            signals.B, signals.C = b.unbind(1), (c,) * PATHS
            signals.y = tuple(rows.transpose(1, 2) for rows in scanned.unbind(1))
            signals.gate = gate.transpose(1, 2)
        return self.out_proj(scanned.sum(1) * gate)

    def _scan(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, decay: Tensor | None, paths: ScanPaths | KeptPaths
    ) -> Tensor:
        """The four scans as one over 4 B rows: x [B, K, D] -> [B, 4, K, D], every path in raster order again."""
        count = x.shape[1]
        u = _take(x, paths.order).unflatten(1, (PATHS, count)).flatten(0, 1)  # [4 B, K, D]
        out = selective_scan(
            u.transpose(1, 2),
            _repeat(dt),
            -_wide(self.A_log).exp(),
            b.flatten(0, 1),
            _repeat(c),
            self.D,
            decay_dt=decay,
            backend=self.scan_backend,
        )
        offset = torch.arange(PATHS, device=x.device).mul(count).unsqueeze(1)
        rows = out.transpose(1, 2).unflatten(0, (-1, PATHS)).flatten(1, 2)  # [B, 4 K, D]
        return _take(rows, paths.inverse + offset).unflatten(1, (PATHS, count))


def on_grid(conv: nn.Module, x: Tensor, grid: tuple[int, int], kept: Tensor | None) -> Tensor:
    """Runs a convolution that keeps the size on the grid of tokens, zeros where tokens are missing.

    Args:
        conv: maps [B, C, H, W] to maps of the same size.
        x: tokens in raster order [B, K, C].
        grid: tokens (high, wide) of the whole image.
        kept: raster positions of the tokens [B, K], ascending; None where all are there.

    Returns:
        [B, K, C].
    """
    if kept is not None:
        length = grid[0] * grid[1]
        batch = x.shape[0]  # len(x) would fix the batch of an export
        at = (kept + length * torch.arange(batch, device=x.device).unsqueeze(1)).flatten()
        x = x.new_zeros(batch * length, x.shape[2]).index_copy(0, at, x.flatten(0, 1)).unflatten(0, (-1, length))
    out = conv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    return out if kept is None else take_rows(out, kept)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows along axis 1 of x [B, M, D] in an order shared by all images [4, K], or one per image [B, 4, K]."""
    return x.index_select(1, index.flatten()) if index.dim() == 2 else take_rows(x, index.flatten(1))


def _repeat(x: Tensor) -> Tensor:
    """Each image's values once a path, as they lie in memory: x [B, D, K] -> [4 B, D, K]."""
    return x.transpose(1, 2).unsqueeze(1).expand(-1, PATHS, -1, -1).flatten(0, 1).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """At least float32: what exponentials of the scan are taken of."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(y: Tensor, grid: tuple[int, int], kept: Tensor | None) -> None:
    length = grid[0] * grid[1]
    if kept is None:
        if y.shape[1] != length:
            raise ValueError(
                f"PlainMambaMixer: {y.shape[1]} tokens are not the {length} of a grid of {tuple(grid)}; say in `kept` "
                "which of them are left"
            )
    elif kept.shape != y.shape[:2] or kept.dtype != torch.int64:
        raise ValueError(
            f"PlainMambaMixer: `kept` is {tuple(kept.shape)} {kept.dtype} for tokens {tuple(y.shape)}; give one int64 "
            "raster position a token"
        )
    elif y.shape[1] > length:
        raise ValueError(f"PlainMambaMixer: {y.shape[1]} tokens cannot be left of a grid of {tuple(grid)}")
