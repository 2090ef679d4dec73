"""Steps of a pruned sequence that decay its state as the full sequence would.

Pruned tokens bring no input, but their steps still decay the state. The product of exponentials is the exponential of a
sum, so the scan of the kept tokens alone gives the same result if each decays by its own step plus those of the gap
before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("hold", "bias", "given")


def gaps_of(positions: Tensor, length: int, reverse: bool = False) -> Tensor:
    """Count the pruned positions between each kept token and the one before it in scan order.

    Args:
        positions: [B, K], kept positions in ascending order, 0 to length - 1.
        length: L, tokens of the full sequence.
        reverse: Whether the scan runs from the last position to the first.

    Returns:
        [B, K] in scan order (the reverse of `positions` if `reverse`); 0 for the first, whose state is zero before.

    Raises:
        ValueError: Positions have another shape, or there are more of them than `length`.

    Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024.
    """
    if positions.dim() != 2:
        raise ValueError(f"gaps_of: positions are {tuple(positions.shape)}; give [B, K]")
    if positions.shape[1] > length:
        raise ValueError(
            f"gaps_of: {positions.shape[1]} positions are kept of a sequence of length {length}; give the length of "
            "the full sequence"
        )
    gaps = positions.diff(dim=1) - 1
    if reverse:
        gaps = gaps.flip(1)
    return F.pad(gaps, (1, 0))


def stretch(
    dt: Tensor,
    gaps: Tensor,
    rule: str = "hold",
    bias_dt: Tensor | None = None,
    given: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Add the steps of the pruned tokens before each kept one to its own, for `selective_scan(decay_dt=...)`.

    Args:
        dt: [B, D, K], steps of the kept tokens after bias and softplus, in scan order.
        gaps: [B, K], pruned positions before each kept one, from `gaps_of`.
        rule: Step of a pruned position: "hold" that of the kept token before it in scan order, "bias" `bias_dt`,
            "given" its own entry of `given`.
        bias_dt: [D], step of a token of zeros, softplus(bias); for "bias".
        given: [B, D, L], steps of the full sequence in scan order; for "given".
        positions: [B, K], places of the kept tokens in `given`, ascending; for "given".

    Returns:
        [B, D, K], steps that decay the state.

    Raises:
        ValueError: The rule is unknown, what it needs is missing, or a shape does not fit.

    Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024.
    """
    if rule not in RULES:
        raise ValueError(f"stretch: rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
    if dt.dim() != 3:
        raise ValueError(f"stretch: dt is {tuple(dt.shape)}; give [B, D, K]")
    batch, dim, kept = dt.shape
    _check_shape("gaps", gaps, (batch, kept), "any rule")
    if rule == "given":
        _check_shape("positions", positions, (batch, kept), "rule 'given'")
        _check_shape("given", given, (batch, dim, None), "rule 'given'")
        return dt + _between(given.to(dt.dtype), positions)
    missing = gaps[:, None].to(dt.dtype)
    if rule == "bias":
        _check_shape("bias_dt", bias_dt, (dim,), "rule 'bias'")
        return dt + missing * bias_dt.to(dt.dtype)[:, None]
    return dt + missing * F.pad(dt[:, :, :-1], (1, 0))


def _between(given: Tensor, positions: Tensor) -> Tensor:
    """Sums of the entries strictly between neighbouring positions, [B, D, K]; 0 for the first.

    Each entry is added to its gap: a difference of running totals would lose the digits of a long sequence.
    """
    batch, dim, length = given.shape
    kept = positions.shape[1]
    is_kept = torch.zeros(batch, length, dtype=torch.int64, device=given.device).scatter(1, positions, 1)
    following = is_kept.cumsum(1)  # index of the kept token that a pruned position lies before
    counts = (is_kept == 0) & (following > 0) & (following < kept)
    target = following.clamp(max=kept - 1)[:, None].expand(-1, dim, -1)
    sums = given.new_zeros(batch, dim, kept)
    return sums.scatter_add(2, target, given * counts[:, None])


def _check_shape(name: str, x: Tensor | None, shape: tuple, who: str) -> None:
    wanted = "[" + ", ".join("L" if size is None else str(size) for size in shape) + "]"
    if x is None:
        raise ValueError(f"stretch: {who} needs {name}; give {wanted}")
    if x.dim() != len(shape) or any(size not in (None, actual) for size, actual in zip(shape, x.shape)):
        raise ValueError(f"stretch: {name} is {tuple(x.shape)}; {who} needs {wanted}")
