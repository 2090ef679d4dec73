"""Several maps as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import TokenMap
from .keep import KeepMap


class ChainMap(TokenMap):
    """Several maps one after the other as one map.

    Args:
        maps: first to last; each takes what the one before leaves.
    """

    def __init__(self, *maps: TokenMap) -> None:
        if any(token_map.gate is not None for token_map in maps):
            raise ValueError("a GateMap cannot be part of a chain, which would lose its gates; return it by itself")
        self.maps = maps
        self.n_in, self.n_out, self.valid = maps[0].n_in, maps[-1].n_out, maps[-1].valid
        self.whole = all(token_map.whole for token_map in maps)
        self.linear = all(token_map.linear for token_map in maps)
        self.drops = any(token_map.drops for token_map in maps)
        self.opens_span = any(token_map.opens_span for token_map in maps)

    def with_lift(self, **options: Any) -> ChainMap:
        return ChainMap(*(token_map.with_lift(**options) for token_map in self.maps))

    def masked(self, visible: Tensor) -> ChainMap:
        maps = []
        for token_map in self.maps:
            maps.append(token_map.masked(visible))
            visible = token_map.pool(visible.unsqueeze(-1).float()).squeeze(-1) > 0
        return ChainMap(*maps)

    @property
    def dropped(self) -> Tensor:
        dropped, assign = self.maps[0].dropped, self.maps[0].assign
        for token_map in self.maps[1:]:
            at = assign.clamp(min=0)
            dropped = dropped | (token_map.dropped.gather(1, at) & (assign >= 0))
            assign = torch.where(assign >= 0, token_map.assign.gather(1, at), -1)
        return dropped

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

    def shares(self, dtype: torch.dtype) -> Tensor | None:
        share, assign = self.maps[0].shares(dtype), self.maps[0].assign
        for token_map in self.maps[1:]:
            own = token_map.shares(dtype)
            if share is None or own is None:
                return None
            at = assign.clamp(min=0)
            share, assign = share * own.gather(1, at), torch.where(assign < 0, -1, token_map.assign.gather(1, at))
        return share

    def means(self, x: Tensor) -> Tensor:
        for token_map in self.maps:
            x = token_map.means(x)
        return x

    def apply(self, x: Tensor) -> Tensor:
        for token_map in self.maps:
            x = token_map.apply(x)
        return x

    def pool(self, mass: Tensor) -> Tensor:
        for token_map in self.maps:
            mass = token_map.pool(mass)
        return mass

    def back(self, y: Tensor) -> Tensor:
        for token_map in reversed(self.maps):
            y = token_map.back(y)
        return y

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        before = [dropped]
        for token_map in self.maps[:-1]:
            before.append(None if dropped is None else token_map.apply(before[-1]))
        for token_map, values in zip(reversed(self.maps), reversed(before)):
            y = token_map.lift(y, values)
        return y

    def lift_to_members(self, y: Tensor) -> Tensor:
        for token_map in reversed(self.maps):
            y = token_map.lift_to_members(y)
        return y

    def matrix(self) -> Tensor:
        matrix = self.maps[0].matrix().double()
        for token_map in self.maps[1:]:
            matrix = token_map.matrix().double() @ matrix
        return matrix


def arrange(token_map: TokenMap, rows: Tensor) -> TokenMap:
    """The map with its new tokens in another order.

    Args:
        token_map: any map.
        rows: the new token that comes to stand in each place [B, N'].
    """
    own = token_map.arranged(rows)
    if own is not None:
        return own
    valid = None if token_map.valid is None else token_map.valid.gather(1, rows)
    return ChainMap(token_map, KeepMap(rows, token_map.n_out, valid))
