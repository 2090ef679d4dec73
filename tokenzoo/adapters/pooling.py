"""Pooling that knows sizes and padding."""

from __future__ import annotations

from torch import Tensor

from ..core.tokens import Tokens
from ..ops.attention import full_precision


def pool_plain(tokens: Tokens, kind: str, include_prefix: bool, mass_weighted: bool) -> Tensor:
    """Pooling without parameters: "token", "avg", "avgmax", "max" or "" (none).

    Args:
        tokens: tokens after the final norm.
        kind: the pooling.
        include_prefix: prefix tokens take part.
        mass_weighted: averages weigh tokens by size, so that they equal the mean over patches where values are equal.
    """
    if kind == "":
        return tokens.x
    if kind == "token":
        return tokens.x[:, 0]
    first = 0 if include_prefix else tokens.layout.own_prefix
    x = tokens.x[:, first:]
    valid = None if tokens.valid is None else tokens.valid[:, first:].unsqueeze(-1)
    mean = greatest = None
    if kind in ("avg", "avgmax"):
        size = tokens.size[:, first:] if mass_weighted and tokens.size is not None else None
        mean = _weighted_mean(x, size, valid)
    if kind in ("max", "avgmax"):
        greatest = (x if valid is None else x.masked_fill(~valid, float("-inf"))).amax(1)
    if kind == "avgmax":
        return 0.5 * (greatest + mean)
    return mean if kind == "avg" else greatest


def _weighted_mean(x: Tensor, size: Tensor | None, valid: Tensor | None) -> Tensor:
    if size is None and valid is None:
        return x.mean(1)
    weight = valid.float() if size is None else size
    if size is not None and valid is not None:
        weight = weight * valid
    with full_precision(x):
        return ((x.float() * weight).sum(1) / weight.sum(1)).to(x.dtype)
