"""Token maps: what a reduction does to the token axis, x' = W x, in forms that never store W.

A method decides a map; everything else (values, token mass, side data, the way back) follows from it. `matrix()` and
`membership()` write the map out densely; they are what the tests hold the fast forms against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .rows import add_rows, max_rows, scatter_values, stable_order, take_rows


class TokenMap(ABC):
    """A map from N tokens to N' tokens, the same shape for every image of the batch.

    Attributes:
        n_in: N, tokens before.
        n_out: N', tokens after.
        valid: [B, N'] bool, False for padding rows; None when the map itself adds no padding.
    """

    n_in: int
    n_out: int
    valid: Tensor | None = None
    linear: bool = True  # False when `apply` is no matrix (elementwise maximum)

    @property
    @abstractmethod
    def heads(self) -> Tensor:
        """Old index of the token that stands for each new one [B, N'], -1 for a token without a single origin."""

    @property
    @abstractmethod
    def assign(self) -> Tensor:
        """New index of every old token [B, N], -1 for a dropped one."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Values of the new tokens: x [B, N, C] -> [B, N', C]."""

    @abstractmethod
    def pool(self, mass: Tensor) -> Tensor:
        """Sums of a per-token quantity over the members of each new token: [B, N, D] -> [B, N', D]."""

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Token sizes after the map; `size` None stands for ones.

        Args:
            size: [B, N, 1] float32 or None.
            batch: B, used when `size` is None.
            device: where to make the ones.
        """
        if size is None:
            size = torch.ones(batch, self.n_in, 1, device=device)
        return self.pool(size)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The way back: every old token reads its new one.

        Args:
            y: values of the new tokens [B, N', D].
            dropped: values that dropped tokens get [B, N, D]; zeros when None.
        """
        assign = self.assign
        back = take_rows(y, assign.clamp(min=0))
        fill = torch.zeros_like(back) if dropped is None else dropped.to(back.dtype)
        return torch.where((assign >= 0).unsqueeze(-1), back, fill)

    def membership(self) -> Tensor:
        """The 0/1 matrix [B, N', N] of which old token stands in which new one."""
        slots = torch.arange(self.n_out, device=self.assign.device).view(1, -1, 1)
        return (self.assign.unsqueeze(1) == slots).float()

    @abstractmethod
    def matrix(self) -> Tensor:
        """The dense W [B, N', N] of `apply`. For tests and pictures: quadratic."""


class KeepMap(TokenMap):
    """Keeps some tokens as they are (top-k, sampling, every k-th).

    Args:
        idx: old index of every kept token [B, N'] in the new order.
        n_in: N.
        valid: [B, N'] bool, False marks padding: such rows become zero.
    """

    def __init__(self, idx: Tensor, n_in: int, valid: Tensor | None = None) -> None:
        self.idx, self.n_in, self.n_out, self.valid = idx, n_in, idx.shape[1], valid

    @property
    def heads(self) -> Tensor:
        return self.idx

    @property
    def assign(self) -> Tensor:
        slots = torch.arange(self.n_out, device=self.idx.device).expand_as(self.idx)
        if self.valid is None:
            return scatter_values(self.n_in, self.idx, slots, -1)
        # padding rows repeat some index: they are written to a column that is cut off again
        idx = torch.where(self.valid, self.idx, self.n_in)
        return scatter_values(self.n_in + 1, idx, slots, -1)[:, : self.n_in]

    def apply(self, x: Tensor) -> Tensor:
        kept = take_rows(x, self.idx)
        return kept if self.valid is None else kept * self.valid.unsqueeze(-1).to(kept.dtype)

    def pool(self, mass: Tensor) -> Tensor:
        return self.apply(mass)

    def mass(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        # keeping rows leaves ones at one: stay None, so that attention needs no bias
        return None if size is None else self.pool(size)

    def matrix(self) -> Tensor:
        return self.membership()


class MergeMap(TokenMap):
    """Merges source tokens into the tokens that stay, as weighted means.

    Only the rows that receive something are touched, so tokens that stand for themselves are exact copies.

    Args:
        order: old index of the token that heads each new one [B, N'].
        src: old indices of the tokens that are merged away [B, S].
        slot: new index each source goes to [B, S], -1 to drop it.
        n_in: N.
        weight: weight of every old token in the means [B, N, 1]; None weighs all alike.
        reduce: "mean", "sum" or "max".
        valid: [B, N'] bool or None.
    """

    def __init__(
        self,
        order: Tensor,
        src: Tensor,
        slot: Tensor,
        n_in: int,
        weight: Tensor | None = None,
        reduce: str = "mean",
        valid: Tensor | None = None,
    ) -> None:
        self.order, self.src, self.slot, self.n_in, self.weight = order, src, slot, n_in, weight
        self.n_out, self.reduce, self.valid = order.shape[1], reduce, valid
        self.linear = reduce != "max"

    @classmethod
    def from_assign(
        cls, order: Tensor, assign: Tensor, weight: Tensor | None = None, valid: Tensor | None = None
    ) -> MergeMap:
        """A map given by the new index of every token [B, N] (-1 drops it) and the head of every new one [B, N']."""
        n_in, n_out = assign.shape[1], order.shape[1]
        is_head = scatter_values(n_in, order, torch.ones_like(order), 0)
        # heads come last, so the first N - N' entries are the sources
        src = stable_order(is_head)[:, : n_in - n_out]
        return cls(order, src, assign.gather(1, src), n_in, weight, "mean", valid)

    @property
    def heads(self) -> Tensor:
        return self.order

    @property
    def assign(self) -> Tensor:
        slots = torch.arange(self.n_out, device=self.order.device).expand_as(self.order)
        return scatter_values(self.n_in, self.order, slots, -1).scatter(1, self.src, self.slot)

    def _received(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Slots to add to, and the source rows, zero where a source is dropped."""
        slot = self.slot.clamp(min=0)
        return slot, take_rows(values, self.src) * (self.slot >= 0).unsqueeze(-1).to(values.dtype)

    def apply(self, x: Tensor) -> Tensor:
        out = take_rows(x, self.order)
        if self.src.shape[1] == 0:
            return out
        if self.reduce == "sum":
            return add_rows(out, *self._received(x))
        if self.reduce == "max":
            return max_rows(out, self.slot, take_rows(x, self.src))
        weight = self.weight
        if weight is None:
            weight = torch.ones(x.shape[0], self.n_in, 1, device=x.device)
        # shares in float32 at least, and in float64 for values that are
        share = self._shares(weight.to(torch.promote_types(weight.dtype, x.dtype))).to(x.dtype)
        slot = self.slot.clamp(min=0)
        # weighted mean = head + sum of share * (source - head): rows without sources stay exact
        delta = share * (take_rows(x, self.src) - take_rows(out, slot))
        return add_rows(out, slot, delta)

    def _shares(self, weight: Tensor) -> Tensor:
        """Share of each source in the mean of its group [B, S, 1]."""
        total = take_rows(self.pool(weight), self.slot.clamp(min=0))
        given = self._received(weight)[1]
        return torch.where(total > 0, given / total.clamp(min=torch.finfo(total.dtype).tiny), torch.zeros_like(given))

    def pool(self, mass: Tensor) -> Tensor:
        return add_rows(take_rows(mass, self.order), *self._received(mass))

    def matrix(self) -> Tensor:
        member = self.membership().double()
        if self.reduce == "sum":
            return member
        if self.reduce == "max":
            raise TypeError("MergeMap(reduce='max') is not linear: it has no matrix; use reduce='mean' or 'sum'")
        weight = member if self.weight is None else member * self.weight.transpose(1, 2)
        total = weight.sum(-1, keepdim=True)
        head = torch.nn.functional.one_hot(self.order, self.n_in).to(weight.dtype)
        return torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), head)


class FuseMap(TokenMap):
    """Keeps some tokens and adds one more: the weighted sum of the tokens that are left out (EViT's fused token).

    Args:
        idx: old index of every kept token [B, K] in the new order.
        weight: raw weight of every old token in the fused one [B, N], zero for kept tokens; not normalised.
        left_out: [B, N] bool, the tokens that the fused one stands for.
        valid: [B, K + 1] bool or None.
    """

    def __init__(self, idx: Tensor, weight: Tensor, left_out: Tensor, valid: Tensor | None = None) -> None:
        self.idx, self.weight, self.left_out, self.valid = idx, weight, left_out, valid
        self.n_in, self.n_out = weight.shape[1], idx.shape[1] + 1

    @property
    def heads(self) -> Tensor:
        return torch.cat([self.idx, torch.full_like(self.idx[:, :1], -1)], dim=1)

    @property
    def assign(self) -> Tensor:
        kept = None if self.valid is None else self.valid[:, :-1]
        return torch.where(self.left_out, self.n_out - 1, KeepMap(self.idx, self.n_in, kept).assign)

    def _with_row(self, x: Tensor, weight: Tensor) -> Tensor:
        kept = take_rows(x, self.idx)
        if self.valid is not None:
            kept = kept * self.valid[:, :-1].unsqueeze(-1).to(kept.dtype)
        fused = torch.bmm(weight.to(x.dtype).unsqueeze(1), x)
        return torch.cat([kept, fused], dim=1)

    def apply(self, x: Tensor) -> Tensor:
        return self._with_row(x, self.weight)

    def pool(self, mass: Tensor) -> Tensor:
        return self._with_row(mass, self.left_out)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        # a token that was left out reappears as it was when given, else it reads the fused token it went into
        back = super().lift(y)
        if dropped is None:
            return back
        return torch.where(self.left_out.unsqueeze(-1), dropped.to(back.dtype), back)

    def matrix(self) -> Tensor:
        kept = KeepMap(self.idx, self.n_in, None if self.valid is None else self.valid[:, :-1]).matrix()
        return torch.cat([kept.double(), self.weight.unsqueeze(1).double()], dim=1)


class MixMap(TokenMap):
    """A dense soft map (slimming modules, token transforming, spreading cluster centres back).

    Mass is shared out along the columns of |W|, so that it is conserved; the way back mixes the new tokens by the same
    shares.

    Args:
        weight: W [B, N', N].
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.n_out, self.n_in = weight.shape[1:]

    @property
    def heads(self) -> Tensor:
        return self.weight.abs().argmax(dim=2)

    @property
    def assign(self) -> Tensor:
        return self.weight.abs().argmax(dim=1)

    def apply(self, x: Tensor) -> Tensor:
        return torch.bmm(self.weight.to(x.dtype), x)

    def membership(self) -> Tensor:
        share = self.weight.abs()
        return share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)

    def pool(self, mass: Tensor) -> Tensor:
        return torch.bmm(self.membership().to(mass.dtype), mass)

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        return torch.bmm(self.membership().transpose(1, 2).to(y.dtype), y)

    def matrix(self) -> Tensor:
        return self.weight


class ChainMap(TokenMap):
    """Several maps one after the other as one map.

    Args:
        maps: first to last; each takes what the one before leaves.
    """

    def __init__(self, *maps: TokenMap) -> None:
        self.maps = maps
        self.n_in, self.n_out, self.valid = maps[0].n_in, maps[-1].n_out, maps[-1].valid
        self.linear = all(token_map.linear for token_map in maps)

    @property
    def heads(self) -> Tensor:
        heads = self.maps[-1].heads
        for token_map in reversed(self.maps[:-1]):
            heads = torch.where(heads >= 0, token_map.heads.gather(1, heads.clamp(min=0)), -1)
        return heads

    @property
    def assign(self) -> Tensor:
        assign = self.maps[0].assign
        for token_map in self.maps[1:]:
            assign = torch.where(assign >= 0, token_map.assign.gather(1, assign.clamp(min=0)), -1)
        return assign

    def apply(self, x: Tensor) -> Tensor:
        for token_map in self.maps:
            x = token_map.apply(x)
        return x

    def pool(self, mass: Tensor) -> Tensor:
        for token_map in self.maps:
            mass = token_map.pool(mass)
        return mass

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        before = [dropped]
        for token_map in self.maps[:-1]:
            before.append(None if dropped is None else token_map.apply(before[-1]))
        for token_map, values in zip(reversed(self.maps), reversed(before)):
            y = token_map.lift(y, values)
        return y

    def matrix(self) -> Tensor:
        matrix = self.maps[0].matrix().double()
        for token_map in self.maps[1:]:
            matrix = token_map.matrix().double() @ matrix
        return matrix
