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
        weight = None if tokens.gate is None else tokens.gate.weight[:, first:].unsqueeze(-1)
        mean = _weighted_mean(x, size, valid, weight)
    if kind in ("max", "avgmax"):
        if tokens.gate is not None:
            valid = open_tokens(tokens)[:, first:].unsqueeze(-1)
        greatest = (x if valid is None else x.masked_fill(~valid, float("-inf"))).amax(1)
    if kind == "avgmax":
        return 0.5 * (greatest + mean)
    return mean if kind == "avg" else greatest


def open_tokens(tokens: Tokens) -> Tensor | None:
    """Tokens that are real and not behind a closed gate [B, N] bool, None where all are; patches all count if none is.

    Args:
        tokens: with or without gates.
    """
    if tokens.gate is None:
        return tokens.valid
    prefix = tokens.layout.own_prefix
    opened = ~tokens.gate.closed
    opened = opened | ~opened[:, prefix:].any(1, keepdim=True)
    return opened if tokens.valid is None else opened & tokens.valid


def _weighted_mean(x: Tensor, size: Tensor | None, valid: Tensor | None, gate: Tensor | None) -> Tensor:
    given = [weight for weight in (size, valid, gate) if weight is not None]
    if not given:
        return x.mean(1)
    weight = given[0].float()
    for other in given[1:]:
        weight = weight * other
    with full_precision(x):
        return ((x.float() * weight).sum(1) / weight.sum(1)).to(x.dtype)
