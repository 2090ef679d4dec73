"""Blocks of timm's vision_transformer_sam.py that run on a map whose windows were shrunk.

Differences from upstream: a block takes and returns a `WindowedMap`. While the windows are shrunk, blocks with windows
attend inside the smaller ones and the others attend to the whole shrunken map; timm resizes the tables of relative
positions to the map they meet, so weights stay as they are. The last block always leaves the full map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.models.vision_transformer_sam import Block
from torch import Tensor

from ...core.method import BlockShape, Step
from ...core.misuse import refuse_attribute, refuse_function, refuse_operator, take_field
from ...core.tokens import Tokens, TraceStep
from ...ops.rows import split_dim
from ..block import BlockPlan
from ..flow import Flow
from ..hooked import Aside, HookedBlock
from ..refusals import refuse_symbols
from ..vit.attention import input_width
from .costs import block_macs, rebuild_macs


class WindowedMap(NamedTuple):
    """What travels from block to block: the map, and how its windows were shrunk.

    Attributes:
        x: the map [B, H', W', C].
        size: (H, W) of the full map.
        window: tokens (down, right) of a shrunken window; None while the map is the full one.
        trace: how every window [B * windows, tokens, C] was shrunk, empty while none was.
        standalone: the blocks were called without their model; the last one hands back a plain tensor.
    """

    x: Tensor
    size: tuple[int, int]
    window: tuple[int, int] | None = None
    trace: tuple[TraceStep, ...] = ()
    standalone: bool = False

    # code that takes it for a tensor gets one sentence
    __getattr__ = refuse_attribute
    __getitem__ = take_field
    __torch_function__ = classmethod(refuse_function)
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = refuse_operator
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = refuse_operator


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cuts a map into windows, zeros filling up the last ones: [B, H, W, C] -> [B * windows, down, right, C]."""
    (down, right), (high, wide) = window, x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -wide % right, 0, -high % down))
    x = split_dim(split_dim(x, 1, -1, down), 3, -1, right)  # [B, rows, down, columns, right, C]
    return x.transpose(2, 3).flatten(0, 2)


def from_windows(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Undoes `to_windows`: [B * windows, down, right, C] -> [B, H, W, C]."""
    down, right = windows.shape[1:3]
    rows, columns = -(-size[0] // down), -(-size[1] // right)
    x = split_dim(windows, 0, -1, rows, columns).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


class ReducingSamBlock(HookedBlock, Block):
    """SAM block on a `WindowedMap`; called with a plain map [B, H, W, C] it does what the model would."""

    tokenzoo: BlockPlan

    def forward(
        self, x: Tensor | WindowedMap, rope: None = None, attn_mask: None = None, aside: Aside | None = None
    ) -> Any:
        if aside is not None:
            return aside.left(self.forward(aside.given(x, self.tokenzoo.name)))
        plan = self.tokenzoo
        state = x
        if not isinstance(x, WindowedMap):
            refuse_symbols(self, x)
            state = WindowedMap(x, (int(x.shape[1]), int(x.shape[2])), standalone=True)
        for step in plan.at("before"):
            state = self._act(step, state)
        state = state._replace(x=self._block(state))
        for step in plan.at("after"):
            state = self._act(step, state)
        if plan.index == plan.depth - 1:
            for step in plan.at("norm"):  # the neck takes the place of the final norm
                state = self._act(step, state)
            state = restored(state, plan.layout.grid, state.trace)
            return state.x if state.standalone else state
        return state

    # ---- what it costs

    @property
    def fused(self) -> bool:
        return self.attn.fused_attn

    def shape(self) -> BlockShape:
        """Sizes for cost formulas."""
        return BlockShape(input_width(self.attn), self.attn.num_heads, self.attn.head_dim)

    def cost(self, flow: Flow) -> int:
        """Multiply-adds of the block on the whole map, or on one whose windows were shrunk."""
        return block_macs(self, flow)

    def overhead(self, flow: Flow) -> int:
        """Multiply-adds of rebuilding windows that are still shrunk behind the last block."""
        return rebuild_macs(self.shape().dim, flow)

    # ---- the flow

    def _block(self, state: WindowedMap) -> Tensor:
        x, window = state.x, state.window
        if window is None or self.window_size == 0:
            return super().forward(x)
        y = self.drop_path1(self.ls1(self.attn(to_windows(self.norm1(x), window))))
        x = x + from_windows(y, x.shape[1:3])
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _act(self, step: Step, state: WindowedMap) -> WindowedMap:
        layout = self.tokenzoo.layout
        windows = to_windows(state.x, state.window or layout.grid)
        tokens = Tokens(windows.flatten(1, 2), layout, trace=state.trace)
        token_map = step.decide(tokens, None)
        if token_map is None:
            return state
        if token_map.undo is not None:
            full = tokens.reduce(token_map, step.block, step.method.name)
            x = from_windows(split_dim(full.x, 1, *layout.grid), state.size)
            return state._replace(x=x, window=None, trace=full.trace)
        if token_map.grid_out is None:
            raise step.error(f"leaves no grid inside the windows of a SAM model ({type(token_map).__name__})")
        fewer = tokens.reduce(token_map, step.block, step.method.name)
        cells = token_map.grid_out
        rows, columns = (-(-length // side) for length, side in zip(state.size, layout.grid))
        x = from_windows(split_dim(fewer.x, 1, *cells), (rows * cells[0], columns * cells[1]))
        return state._replace(x=x, window=cells, trace=fewer.trace)


def restored(state: WindowedMap, window: tuple[int, int], trace: tuple[TraceStep, ...]) -> WindowedMap:
    """The full map, each window lifted back.

    Args:
        state: a map, its windows shrunk or not.
        window: tokens (down, right) of a full window.
        trace: how the windows were shrunk, with the options of the way back.
    """
    if state.window is None:
        return state
    x = to_windows(state.x, state.window).flatten(1, 2)
    for step in reversed(trace):
        x = step.map.lift(x)
    x = from_windows(split_dim(x, 1, *window), state.size)
    return state._replace(x=x, window=None, trace=())
