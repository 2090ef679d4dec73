"""The way back to the full grid: values of the tokens that are left, given to every token there was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import full_precision
from ..ops.rows import scatter_values, split_dim, stable_order, take_rows
from .tokens import TraceStep

FILLS = ("stash", "nearest", "zero")
_ROWS = 256  # dropped tokens that are compared with all kept ones at once


@dataclass(frozen=True, kw_only=True)
class Fill:
    """What dropped tokens get on the way back; merged ones always read the token they went into.

    Args:
        kind: "stash" gives back the value a token had when it was dropped; "nearest" mixes the k kept tokens that were
            most like it at that time; "zero" leaves zeros (tokens fused into another read that one).
        k: kept tokens that "nearest" mixes.
        temperature: inverse temperature of the mix, weights exp(-temperature * squared distance).
        norm: the weights of a mix have this norm 1: "l1" (a mean) or "l2" (as released with EViT's dense form).

    Source: Liang et al., NeurIPS 2022 (the nearest-neighbour recovery of their EViT baseline; k=1 there).
    """

    kind: str = "stash"
    k: int = 1
    temperature: float = 0.005
    norm: str = "l1"

    def __post_init__(self) -> None:
        if self.kind not in FILLS:
            raise ValueError(f"fill={self.kind!r}; use one of {FILLS}")
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"fill: k={self.k!r}; give the number of kept tokens to mix, at least 1")
        if not self.temperature > 0:
            raise ValueError(f"fill: temperature={self.temperature!r} has to be positive")
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"fill: norm={self.norm!r}; use 'l1' or 'l2'")

    @classmethod
    def parse(cls, fill: Any) -> Fill:
        """Reads a name, a dict of options or a Fill."""
        if isinstance(fill, Fill):
            return fill
        if isinstance(fill, str):
            return cls(kind=fill)
        if isinstance(fill, Mapping):
            unknown = sorted(set(fill) - set(cls.__dataclass_fields__))
            if unknown:
                raise ValueError(f"fill: unknown options {unknown}; it has {sorted(cls.__dataclass_fields__)}")
            return cls(**fill)
        raise TypeError(f"fill={fill!r}; give one of {FILLS}, a dict of options, or a Fill")

    def to_plain(self) -> str | dict[str, Any]:
        """The shortest form that `parse` takes back."""
        return self.kind if self == Fill(kind=self.kind) else asdict(self)


def lift(
    x: Tensor,
    trace: tuple[TraceStep, ...],
    fill: Fill | str = "stash",
    through: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Carries values back to the tokens that entered the first reduction.

    Args:
        x: values of the current tokens [B, N', D].
        trace: the reductions, first to last.
        fill: what dropped tokens get.
        through: applied to stashed values first (the final norm, when x went through it); None for nothing.

    Returns:
        Values [B, N, D] in the original order.

    Raises:
        ValueError: the trace lacks what the fill needs, or values of another width cannot be given back.
    """
    fill = Fill.parse(fill)
    for step in reversed(trace):
        if not step.map.drops or fill.kind == "zero":
            x = step.map.lift(x)
            continue
        if step.before is None:
            raise ValueError(f"fill={fill.kind!r} needs values that were not kept; run forward_tokens(..., dense=True)")
        if fill.kind == "nearest":
            x = _nearest(x, step, fill)
            continue
        stash = step.before if through is None else through(step.before)
        if stash.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"block {step.block}: tokens that {step.method} dropped have {stash.shape[-1]} channels, but values of "
                f"{x.shape[-1]} channels are carried back; use fill='nearest' or 'zero', or restore features before "
                "the decoder"
            )
        x = step.map.lift(x, stash)
    return x


def _nearest(x: Tensor, step: TraceStep, fill: Fill) -> Tensor:
    """The way back through one map; dropped tokens get a mix of the kept tokens most like them."""
    token_map, prefix = step.map, step.prefix
    heads, dropped = token_map.heads, token_map.dropped
    usable = heads[:, prefix:] >= 0
    if token_map.valid is not None:
        usable = usable & token_map.valid[:, prefix:]
    if token_map.gate is not None:
        usable = usable & ~dropped[:, prefix:]  # closed tokens stand there still
    kept = take_rows(step.before, heads[:, prefix:].clamp(min=0))
    # where images may drop different numbers of tokens, every token is looked at
    count = token_map.n_in if token_map.num_dropped is None else token_map.num_dropped
    if count == 0:
        return token_map.lift(x)
    lost = stable_order((~dropped).long())[:, :count]
    mixed = _mix(take_rows(step.before, lost), kept, usable, x[:, prefix:], fill)
    slot = scatter_values(token_map.n_in, lost, torch.arange(count, device=x.device).expand_as(lost), 0)
    back = token_map.lift(x)
    return torch.where(dropped.unsqueeze(-1), take_rows(mixed, slot), back)


def _mix(lost: Tensor, kept: Tensor, usable: Tensor, values: Tensor, fill: Fill) -> Tensor:
    """Weighted mixes of values [B, K, D] for rows lost [B, L, C] by their distance to kept rows [B, K, C]."""
    k = min(fill.k, kept.shape[1])
    kept = kept.float()
    out = []
    with full_precision(values):
        norms = kept.square().sum(-1).masked_fill(~usable, float("inf")).unsqueeze(1)
        for rows in lost.float().split(_ROWS, dim=1):
            far = norms - 2 * rows @ kept.transpose(1, 2) + rows.square().sum(-1, keepdim=True)
            near, idx = far.clamp(min=0).topk(k, dim=2, largest=False)
            # an image may have kept fewer than k tokens, or none
            weight = torch.exp(-fill.temperature * (near - near[..., :1])).nan_to_num(nan=0.0)
            norm = weight.norm(dim=2, keepdim=True) if fill.norm == "l2" else weight.sum(2, keepdim=True)
            norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)
            picked = split_dim(take_rows(values, idx.flatten(1)), 1, -1, k)
            out.append(((weight / norm).unsqueeze(-1).to(values.dtype) * picked).sum(2))
    return torch.cat(out, dim=1)
